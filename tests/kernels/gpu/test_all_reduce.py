"""The one-shot all-reduce's protocol: ranks as processes, peer memory as shared memory, Triton's
interpreter as the device. Also where there is no GPU, given Triton; on GPUs, see test_gpu_ranks.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from tests.kernels.gpu.gpu_support import INTERPRETED

pytest.importorskip("triton", reason="needs Triton, its interpreter at least")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter by itself")

ROWS, CALLS = 4, 12


def rank_main(rank: int, buffers: list[Tensor], flags: list[Tensor], results: Any) -> None:
    """Calls of every kind and length, one after the other: both halves of the buffer are reused."""
    torch.set_num_threads(1)
    from millrace.kernels.gpu.all_reduce import PeerMemory, one_shot, one_shot_norm
    from millrace.kernels.norm import rms_norm

    size, width, dtype = len(buffers), buffers[0].shape[-1], buffers[0].dtype
    addresses = [torch.tensor([t.data_ptr() for t in shared]) for shared in (buffers, flags)]
    calls = torch.full((ROWS,), 2**31 - 5, dtype=torch.int32)  # wraps around on the way
    memory = PeerMemory(rank, size, ROWS, width, *addresses, calls)
    problems = []
    for call in range(CALLS):
        tokens = (4, 1, 2, 3)[call % 4]
        parts = [random(100 * call + peer, tokens, width).to(dtype) for peer in range(size)]
        total = torch.stack(parts).float().sum(0)
        if call % 3 == 0:
            if not torch.equal(one_shot(parts[rank].clone(), memory), total.to(dtype)):
                problems.append(f"call {call}: sum")
            continue
        residual, weight = random(call, tokens, width).to(dtype), random(call, width)
        normed, quantized, sums = one_shot_norm(
            parts[rank], residual, weight, 1e-6, memory, quantized=call % 3 == 2
        )
        stream = (total + residual.float()).to(dtype)  # rounded once, not behind the sum as well
        expected = rms_norm.__wrapped__(stream, weight, 1e-6)  # type: ignore[attr-defined]
        if not torch.equal(sums, stream):
            problems.append(f"call {call}: sum and residual")
        if not torch.allclose(normed, expected, rtol=1e-3, atol=1e-3):
            problems.append(f"call {call}: norm")
        if quantized is not None:
            error = (quantized.dequantize() - expected.float()).abs().max()
            if error > 0.16 * expected.float().abs().max():  # the interpreter's e4m3 is coarse
                problems.append(f"call {call}: quantised norm")
    results.put((rank, problems))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "width", "dtype"),
    [(2, 200, torch.float32), (2, 256, torch.float16), (3, 128, torch.float32)],
)
def test_every_rank_gets_the_sum(
    size: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the ranks, before they load Triton
    context = mp.get_context("spawn")
    buffers = [torch.full((2, ROWS, width), float("nan"), dtype=dtype) for _ in range(size)]
    flags = [torch.full((ROWS * size,), 2**31 - 5, dtype=torch.int32) for _ in range(size)]
    for shared in (*buffers, *flags):
        shared.share_memory_()
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(rank, buffers, flags, results), daemon=True)
        for rank in range(size)
    ]
    for one in ranks:
        one.start()
    try:
        assert sorted(results.get(timeout=120) for _ in ranks) == [(r, []) for r in range(size)]
    finally:
        for one in ranks:
            one.kill()
            one.join()
