"""The table of docs/model.md about weights that a step reads is what the work model says."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.model.tiny import FP8_BLOCKS
from millrace.model.work import StepShape, experts_hit, formats_of, step_work, weight_counts
from tests.model.test_moe import CODER_30B, QWEN3_5, read

DOC = (Path(__file__).parents[3] / "docs" / "model.md").read_text(encoding="utf-8")
MODELS = {
    "Qwen3.5 35B-A3B": QWEN3_5["35b"], "Qwen3.5 122B-A10B": QWEN3_5["122b"],
    "Qwen3.5 397B-A17B": QWEN3_5["397b"], "Qwen3-Coder 30B-A3B": CODER_30B,
}  # fmt: skip
TOKENS = (1, 4, 16, 64, 256)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_a_step_reads(tmp_path: Path, name: str) -> None:
    config = read(
        tmp_path, {**MODELS[name], "quantization_config": FP8_BLOCKS, "dtype": "bfloat16"}
    )
    counts, formats = weight_counts(config), formats_of(config)
    assert config.experts is not None
    total, active = (counts.total(n) / 1e9 for n in (config.experts.count, config.experts.top_k))
    cells = [f"{total:.1f}", f"{active:.2f}"]
    for tokens in TOKENS:
        work = step_work(config, StepShape.of(rows=tokens), formats)
        gemms = [work.parts[part] for part in ("linear", "experts", "heads")]
        flops = sum(part.flops for part in gemms) / tokens
        hit, read_bytes = experts_hit(config, tokens), sum(part.read for part in gemms)
        cells.append(f"{hit:.0f}, {read_bytes / 1e9:.1f} GB")
    assert f"| {name} | {' | '.join([*cells, f'{flops / 1e9:.1f}'])} |" in DOC
