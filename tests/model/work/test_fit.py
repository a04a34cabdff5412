"""What published models need on 1, 2, 4 and 8 GPUs, and which of them fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.model.build import rank_bytes
from millrace.model.cache_spec import CacheOptions
from millrace.model.config import ModelConfig
from millrace.model.tiny import FP8_BLOCKS
from millrace.model.work import Layout
from millrace.model.work.fit import GiB, RankNeed, formats_in_memory, problem, rank_needs, summary
from tests.model.test_moe import QWEN3_5, read

H200 = 143_771 * 2**20 * 0.92
OPTIONS = CacheOptions("bfloat16", "bfloat16", "float32", 16, 16384, 1, 16, draft_head=True)


def needs_of(tmp_path: Path, name: str) -> tuple[ModelConfig, list[RankNeed]]:
    """In FP8, with a draft, and sequences of 262,144 tokens."""
    config = read(tmp_path, {**QWEN3_5[name], "quantization_config": FP8_BLOCKS})
    formats = formats_in_memory(config, "bfloat16", kept=True)
    return config, rank_needs(
        config, formats, config.cache_spec(OPTIONS), OPTIONS.max_pages * 16, drafts=True
    )


def test_35b_is_cut_by_width_up_to_4_and_by_experts_for_8(tmp_path: Path) -> None:
    config, needs = needs_of(tmp_path, "35b")
    assert [need.layout for need in needs] == [Layout(1), Layout(2), Layout(4), Layout(8, True)]
    whole = rank_bytes(config, "bfloat16", 8, mtp=True, kept=True, whole_experts=True)
    assert needs[3].weights == pytest.approx(whole, rel=0.03)  # the shared expert is not cut
    assert all(need.bytes < H200 for need in needs)


@pytest.mark.parametrize(("name", "weights", "fitting"), [("122b", 117.6, "1, 2, 4, 8"),
                                                          ("397b", 377.4, "4, 8")])  # fmt: skip
def test_large_ones(tmp_path: Path, name: str, weights: float, fitting: str) -> None:
    """122B leaves little of one GPU for requests, and 397B needs four."""
    _, needs = needs_of(tmp_path, name)
    assert needs[0].weights / GiB == pytest.approx(weights, rel=0.01)
    assert needs[1].weights == pytest.approx(needs[0].weights / 2, rel=0.01)
    assert summary(needs, H200, "an H200").endswith(f"129.2 GiB may be used: {fitting} fit")


def test_a_start_that_cannot_fit_says_what_would(tmp_path: Path) -> None:
    _, needs = needs_of(tmp_path, "397b")
    one, four = needs[0], needs[2]
    assert problem(needs, four.layout, four.weights, H200) is None
    said = problem(needs, one.layout, one.weights, H200)
    assert said == (
        "the weights take 377.4 GiB on a rank of 1, and 129.2 GiB of this GPU are free; "
        "tensor_parallel_size 4 or 8 fits"
    )
    assert "more GPUs than 8" in str(problem(needs, needs[-1].layout, one.weights, H200))
