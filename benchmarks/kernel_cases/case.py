"""A case: one variant of one op, how it is checked, how it is timed, and its floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from energy import Energy
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


def player(calls: list[Callable[[], object]], captured: bool = True) -> Callable[[], None]:
    """What makes all of the calls, as a graph where they can be captured."""

    def play() -> None:
        for call in calls:
            call()

    play()
    torch.cuda.synchronize()
    if not captured:
        return play
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        play()
    return graph.replay


def timed(calls: list[Callable[[], object]], captured: bool = True, replays: int = 7) -> float:
    """Median seconds of one call."""
    return timed_plays(player(calls, captured), len(calls), replays)


def spent(play: Callable[[], None], count: int, seconds: float) -> dict[str, float]:
    """Joules and microseconds of one of `count` calls, and watts, over so many seconds of plays.

    They follow a tenth as long of them that is not counted. The time is that of calls one behind
    the other at the device's power limit, which may be more than that of a few.
    """
    energy = Energy()
    one = timed_plays(play, 1, 3)
    for _ in range(int(0.1 * seconds / one)):
        play()
    torch.cuda.synchronize()
    plays, before, began = max(1, int(seconds / one)), energy.joules(), time.perf_counter()
    for _ in range(plays):
        play()
    torch.cuda.synchronize()
    took, used = time.perf_counter() - began, energy.joules() - before
    calls = plays * count
    return {"joules": used / calls, "watts": used / took, "sustained_us": 1e6 * took / calls}


def timed_plays(play: Callable[[], None], count: int, replays: int) -> float:
    """Median seconds of one of the `count` calls that a play makes."""
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        play()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / count)
    return statistics.median(times[1:])


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and bf16 matrix rate of this device; FP8's rate."""
    source = torch.randn(1 << 30, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)])
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * 8192**3 / timed([lambda: a @ b] * 4)
    return {"bytes": copy, "bf16": bf16, "fp8": 1300e12}


def measure(case: Case, ceiling: dict[str, float], seconds: float = 0.0) -> dict[str, object]:
    """seconds: how long to count joules; 0: not."""
    row: dict[str, object] = {"name": case.name}
    floor = max(case.bytes / ceiling["bytes"], case.flops / ceiling[case.rate])
    row["floor_us"] = floor * 1e6
    try:
        row["error"] = case.check()
        row["right"] = row["error"] <= case.limit
        calls = case.calls()
        play = player(calls, case.captured)
        one = timed_plays(play, len(calls), 7)
        row |= {"us": one * 1e6, "tb_s": case.bytes / one / 1e12}
        row["tflop_s"] = case.flops / one / 1e12
        if seconds:
            row |= spent(play, len(calls), seconds)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        row["right"] = False
    torch.cuda.empty_cache()
    return row
