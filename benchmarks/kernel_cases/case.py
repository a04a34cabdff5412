"""A case: one variant of one op, how it is checked, how it is timed, and its floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_cases.shapes import DEVICE


@dataclass
class Case:
    """One variant of one op. check: its error against the reference; calls: what is timed, each
    call moving `bytes` bytes and doing `flops` operations on the unit `rate`."""

    name: str
    check: Callable[[], float]
    limit: float
    calls: Callable[[], list[Callable[[], object]]]
    bytes: float
    flops: float = 0.0
    rate: str = "bf16"
    captured: bool = True  # False: the call copies from the host and is timed as it is


def relative(x: Tensor, y: Tensor) -> float:
    """||x - y|| / ||y||; infinite where one has a NaN and the other not."""
    x, y = x.double(), y.double()
    if bool((x.isnan() != y.isnan()).any()):
        return float("inf")
    x, y = x.nan_to_num(), y.nan_to_num()
    return ((x - y).norm() / y.norm().clamp(min=1e-30)).item()


def timed(calls: list[Callable[[], object]], captured: bool = True, replays: int = 7) -> float:
    """Median seconds of one call."""

    def play() -> None:
        for call in calls:
            call()

    play()
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            play()
        play = graph.replay
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        play()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and bf16 matrix rate of this device; FP8's rate."""
    source = torch.randn(1 << 30, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)])
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * 8192**3 / timed([lambda: a @ b] * 4)
    return {"bytes": copy, "bf16": bf16, "fp8": 1300e12}


def measure(case: Case, ceiling: dict[str, float]) -> dict[str, object]:
    row: dict[str, object] = {"name": case.name}
    floor = max(case.bytes / ceiling["bytes"], case.flops / ceiling[case.rate])
    row["floor_us"] = floor * 1e6
    try:
        row["error"] = case.check()
        row["right"] = row["error"] <= case.limit
        seconds = timed(case.calls(), case.captured)
        row |= {"us": seconds * 1e6, "tb_s": case.bytes / seconds / 1e12}
        row["tflop_s"] = case.flops / seconds / 1e12
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        row["right"] = False
    torch.cuda.empty_cache()
    return row
