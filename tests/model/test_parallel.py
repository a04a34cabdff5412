"""Two, and four, ranks compute what one does, and sizes that cannot be cut are refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millrace.errors import ConfigError
from millrace.model.config import read_config
from millrace.model.parallel import TensorParallel
from millrace.model.qwen3_5 import build_model
from millrace.model.tiny import UNIT_TEST, write_checkpoint
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches, make_batch

SHAPE = replace(UNIT_TEST, num_heads=8, num_kv_heads=4, key_heads=4, value_heads=12, vocab_size=321)


class Meeting:
    """Ranks as threads of one process, which meet at each collective."""

    def __init__(self, size: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.parts[rank] = x
        self.barrier.wait()
        parts = [part.clone() for part in self.parts]
        self.barrier.wait()
        return parts

    def rank(self, rank: int) -> TensorParallel:
        return TensorParallel(
            rank,
            len(self.parts),
            lambda x: torch.stack(self.exchange(rank, x)).sum(0),
            lambda x: torch.cat(self.exchange(rank, x), dim=-1),
        )


def run(directory: Path, tp: TensorParallel) -> list[Tensor]:
    """Prefill, a verify row and the draft head on one rank: logits and hidden."""
    model = build_model(read_config(directory), dtype=torch.float32, tp=tp, mtp=True)
    load(model, directory)
    padding = model.embedding.weight[SHAPE.vocab_size - model.embedding.start :]
    assert not bool(padding.any())
    driver = Driver(model, allocate_caches(model, 2, 30, drafts=1, ranks=tp.size))
    driver.admit(1)
    ids = [(11 * i) % 321 for i in range(70)]
    _, [prompt] = driver.step(prefill=[(1, ids[:66])])
    [verified], _ = driver.step(decode=[(1, ids[66:68])], padded=1)
    token, batch = make_batch(driver.caches, torch.tensor([0, 1, 0]), [], [(1, ids[1:66])])
    assert model.mtp is not None
    with torch.inference_mode():
        drafted = model.mtp(token, prompt[:65], batch, driver.caches)
        return [model.logits(prompt), model.logits(verified), drafted]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one(tmp_path: Path, size: int) -> None:
    directory = write_checkpoint(tmp_path, SHAPE)
    alone = run(directory, TensorParallel())
    meeting, results = Meeting(size), {}

    def work(rank: int) -> None:
        results[rank] = run(directory, meeting.rank(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == size
    for rank in range(size):
        for ours, expected, first in zip(results[rank], alone, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
            assert bool((ours == first).all()), "ranks must not disagree by a rounding"


@pytest.mark.parametrize("size", [3, 8])
def test_sizes_that_do_not_divide(tmp_path: Path, size: int) -> None:
    config = read_config(write_checkpoint(tmp_path, SHAPE))
    with pytest.raises(ConfigError, match="sizes that work: 1, 2, 4") as error:
        build_model(config, dtype=torch.float32, device="meta", tp=TensorParallel(0, size))
    assert "KV heads" in str(error.value)


def test_fp8_blocks_are_not_cut(tmp_path: Path) -> None:
    shape = replace(
        SHAPE, fp8=True, head_dim=128, key_dim=128, value_dim=128, intermediate_size=256
    )
    config = read_config(write_checkpoint(tmp_path, shape))
    options = {"dtype": torch.bfloat16, "device": "meta", "tp": TensorParallel(0, 4)}
    build_model(config, **options)
    with pytest.raises(ConfigError, match=r"blocks of 128; sizes that work: 1, 2$"):
        build_model(config, keep_fp8=True, **options)
