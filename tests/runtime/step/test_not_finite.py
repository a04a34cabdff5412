"""A model that computes NaN: it does not start, and a row that does ends alone, with an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from millrace import LLM
from millrace import SamplingParams as LLMParams
from millrace.errors import CheckpointError, ModelError
from millrace.protocol import AddRequest, SamplingParams
from tests.support.damaged_model import damaged, untied_model
from tests.support.engines import build, run

BAD = 7  # a token whose embedding is NaN
GOOD = [[5, 6, 9, 11, 200, 3], [4] * 30]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untied_model(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def half_good(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that computes NaN behind the token BAD only."""
    folder = tmp_path_factory.mktemp("half-good")
    return damaged(untied, folder, "embed_tokens.weight", BAD, torch.nan)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tensor", ["embed_tokens.weight", "down_proj.weight", "lm_head.weight"])
def test_a_model_that_computes_nan_does_not_start(
    untied: Path, tmp_path: Path, tensor: str, value: float
) -> None:
    model = damaged(untied, tmp_path, tensor, None, value)
    with pytest.raises(CheckpointError, match="logits that are NaN or infinite; the weights are"):
        build(model, debug=False)


def test_a_single_bad_row_of_the_output_head_is_found(untied: Path, tmp_path: Path) -> None:
    model = damaged(untied, tmp_path, "lm_head.weight", 123, torch.nan)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        build(model, debug=False)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"async_scheduling": True}, id="pipelined"),
        pytest.param({"max_num_batched_tokens": 13}, id="chunks"),
        pytest.param({"enable_prefix_caching": True, "block_size": 4}, id="prefix-cache"),
        pytest.param({"tensor_parallel_size": 2}, id="two-ranks", marks=pytest.mark.sweep),
        pytest.param(
            {"speculative_config": {"num_speculative_tokens": 2}, "async_scheduling": True},
            id="drafts",
        ),
    ],
)
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "top_k": 5, "seed": 3},
               {"frequency_penalty": 0.5}, {"logprobs": 2}]
)  # fmt: skip
def test_a_bad_row_ends_alone(
    half_good: Path, options: dict[str, Any], params: dict[str, Any]
) -> None:
    engine = build(half_good, **options)
    bad_prompt = [*GOOD[0] * 4, BAD, 5]
    prompts = [*GOOD, bad_prompt, [BAD]]
    chosen = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params})
    for number, prompt in enumerate(prompts):
        engine.add(AddRequest(str(number), prompt, chosen))
    output: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    ends = {}
    while engine.has_work():
        for delta in engine.step():
            output[delta.id] += delta.token_ids
            if delta.finish_reason is not None:
                ends[delta.id] = delta
    assert [ends[str(n)].finish_reason for n in range(4)] == ["length", "length", "error", "error"]
    assert [len(output[str(n)]) for n in range(4)] == [12, 12, 0, 0]
    for number in ("2", "3"):
        assert ends[number].model_failed
        assert "NaN or infinite" in str(ends[number].error)
    assert engine.stats().rows_not_finite == 2
    engine.scheduler.reset_prefix_cache()
    engine.scheduler.check_integrity()
    assert engine.stats().free_pages == engine.stats().total_pages
    engine.close()


def test_a_bad_row_ends_alone_on_two_ranks(half_good: Path) -> None:
    """Where both need the whole vocabulary."""
    params = {"temperature": 1.0, "top_k": 5, "seed": 3}
    test_a_bad_row_ends_alone(half_good, {"tensor_parallel_size": 2}, params)


@pytest.mark.parametrize("k", [0, 2])
def test_tokens_before_the_bad_one_have_been_sent(untied: Path, tmp_path: Path, k: int) -> None:
    """The embedding of a token that is generated is NaN: the row ends behind it."""
    options: dict[str, Any] = {"speculative_config": {"num_speculative_tokens": k}} if k else {}
    (whole,), _ = run(untied, [GOOD[0]])
    at = next(n for n in range(2, 24) if whole[n] not in [*whole[:n], *GOOD[0], 0])
    model = damaged(untied, tmp_path, "embed_tokens.weight", whole[at], torch.nan)
    engine = build(model, **options)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    engine.add(AddRequest("a", GOOD[0], params))
    sent, reason = [], None
    while engine.has_work():
        for delta in engine.step():
            sent += delta.token_ids
            reason = delta.finish_reason
    assert reason == "error"
    assert sent == whole[: len(sent)]
    assert at + 1 - k <= len(sent) <= at + 1
    engine.close()


def test_the_library_raises_what_happened(half_good: Path) -> None:
    torch.set_num_threads(1)
    with LLM(str(half_good), dtype="float32", max_model_len=64) as llm:
        with pytest.raises(ModelError, match="NaN or infinite"):
            llm.generate([[BAD]], LLMParams(max_tokens=2))
        (output,) = llm.generate([[5, 6]], LLMParams(max_tokens=2, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 2
