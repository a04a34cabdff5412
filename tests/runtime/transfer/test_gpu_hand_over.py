"""Hand-overs between two engines on one GPU: the tokens of a CPU. The twin is test_hand_over.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.transfer.test_hand_over import (
    PROMPTS,
    alone,
    assert_all_moved,
    hand_over,
    options,
    pair,
)
from tests.support.engines import assert_same

pytestmark = pytest.mark.gpu

GPU_TIE = 1e-2


@pytest.mark.parametrize(("transport", "k"), [("shm", 0), ("shm", 2), ("tcp", 1), ("nixl", 1)])
def test_same_tokens_on_a_gpu(tiny_model: Path, transport: str, k: int) -> None:
    given = options(
        k, device="cuda", kv_transport=transport, kv_cache_memory_bytes=1 << 30, debug=False
    )
    with pair(tiny_model, given, given) as engines:
        answers = [hand_over(engines, prompt) for prompt in PROMPTS]
        assert_all_moved(engines)
    assert_same(tiny_model, PROMPTS, alone(tiny_model, PROMPTS), answers, GPU_TIE)
