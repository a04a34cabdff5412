"""Keywords of vLLM 0.33's SamplingParams that Millrace's lacks, and what becomes of them.

Scripts written for vLLM pass them, mostly at values at which they change nothing. Those are
accepted; a value that would change the outputs is refused with the reason. It knows no option of
Millrace: the class that it is the metaclass of has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import msgspec

from millrace.errors import RequestError

# name -> (values at which it changes nothing; None: all of them), why others are refused.
KEYWORDS: Mapping[str, tuple[tuple[Any, ...] | None, str]] = {
    "output_kind": (None, ""),  # outputs are returned whole
    "stream_interval": (None, ""),
    "skip_clone": (None, ""),
    "flat_logprobs": ((False,), "log-probabilities have one shape"),
    "spaces_between_special_tokens": ((True,), "tokens are shown as their own bytes"),
    "extra_args": ((None, {}), "the engine takes no arguments of extensions"),
    "logits_processors": ((None, []), "code of others is not run here; logit_bias may do"),
    "watermarking": ((None, False), "texts are not marked"),
    "prompt_logprob_token_ids": ((None,), "prompt_logprobs reports the likeliest tokens"),
    "prompt_logprob_start": ((None, 0), "prompt_logprobs begins with the prompt"),
    "skip_reading_prefix_cache": ((None, False), "start with enable_prefix_caching=False"),
    "repetition_detection": ((None,), "use repetition_penalty or stop"),
    "routed_experts_prompt_start": ((0,), "no experts are reported"),
    "trace_decode_token_ids": ((None, []), "tokens are sampled"),
    "truncate_prompt_tokens": ((None,), "cut the prompt's token ids"),
    "guided_decoding": ((None,), "use structured_outputs"),
    "best_of": ((None, 1), "use n, and compare cumulative_logprob"),
    "use_beam_search": ((False,), "outputs are sampled; n gives several"),
    "length_penalty": ((1.0,), "it belongs to beam search"),
    "early_stopping": ((False,), "it belongs to beam search"),
}


class KeywordMeta(msgspec.StructMeta):
    """The metaclass of a struct that takes vLLM's other keywords too."""

    if not TYPE_CHECKING:  # type checkers see the struct's own fields

        def __call__(self, *args: Any, **given: Any) -> Any:
            """Make a struct. Raises RequestError for a keyword that cannot work."""
            fields = self.__struct_fields__
            for name in [name for name in given if name not in fields]:
                _check(self.__name__, name, given.pop(name), fields)
            return super().__call__(*args, **given)


def _check(kind: str, name: str, value: Any, fields: tuple[str, ...]) -> None:
    """Raise RequestError unless a keyword that is no field changes nothing."""
    if name not in KEYWORDS:
        close = get_close_matches(name, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields)}"
        raise RequestError(f"{kind} has no {name!r}; {hint}", param=name)
    neutral, reason = KEYWORDS[name]
    if neutral is not None and not any(_same(value, one) for one in neutral):
        raise RequestError(f"{name} is not supported: {reason}; leave it out", param=name)


def _same(value: Any, neutral: Any) -> bool:
    """Equal and of the same kind: 0 is not False."""
    if isinstance(value, bool) != isinstance(neutral, bool):
        return False
    return value is None if neutral is None else bool(value == neutral)
