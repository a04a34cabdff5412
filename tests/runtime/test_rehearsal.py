"""The rehearsal: the largest steps run on one page, whatever the limits are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.runtime.rehearsal import _few_slots, rehearse
from tests.support.engines import build


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 64, "max_num_batched_tokens": 700, "mixed_prefill_tokens": 300},
        {"speculative_config": {"num_speculative_tokens": 3}, "enable_prefix_caching": True},
        {"max_num_seqs": 1, "max_model_len": 17, "max_num_batched_tokens": 64},
    ],
)
def test_the_largest_steps_run_on_one_page(tiny_model: Path, options: dict[str, Any]) -> None:
    worker: Any = build(tiny_model, **options)._worker
    config = worker.config
    runner = worker._build_runner(_few_slots(config), 1, 0)
    tokens: list[int] = []
    forward = runner._model.forward

    def noted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        tokens.append(len(ids))
        hidden: torch.Tensor = forward(ids, *rest)
        assert hidden.isfinite().all()
        return hidden

    runner._model.forward = noted
    rehearse(config, runner)
    most = config.max_num_seqs * (config.max_model_len - 1)
    assert tokens[0] == min(config.max_num_batched_tokens, most)
    decoding = config.max_num_seqs * (config.drafts + 1)
    assert tokens[1] == decoding + min(config.mixed_prefill_tokens, most)
