"""SamplingParams as scripts for vLLM make them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from millrace import SamplingParams
from millrace.errors import RequestError


def test_none_is_the_default_of_a_list_and_one_text_a_list_of_it() -> None:
    given: Any = {"stop": None, "stop_token_ids": None, "bad_words": None, "seed": None}
    assert SamplingParams(**given) == SamplingParams()
    one: Any = {"stop": "\n", "bad_words": "no"}
    assert SamplingParams(**one) == SamplingParams(stop=["\n"], bad_words=["no"])


def test_keywords_that_change_nothing_are_taken() -> None:
    given: Any = {
        "output_kind": 2,
        "skip_clone": True,
        "spaces_between_special_tokens": True,
        "extra_args": None,
        "logits_processors": [],
        "repetition_detection": None,
        "best_of": 1,
    }
    params = SamplingParams(temperature=0.5, **given)
    assert params == SamplingParams(temperature=0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"best_of": 3}, "best_of is not supported: use n"),
        ({"watermarking": True}, "texts are not marked; leave it out"),
        ({"routed_experts_prompt_start": False}, "no experts are reported"),
        ({"temprature": 1.0}, "has no 'temprature'; did you mean temperature?"),
        ({"zzz": 1}, "has no 'zzz'; it has n, temperature"),
    ],
)
def test_others_are_refused_with_the_reason(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    assert message in str(caught.value)
    assert caught.value.param == next(iter(given))
