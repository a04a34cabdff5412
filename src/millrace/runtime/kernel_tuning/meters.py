"""What a call costs: seconds or joules, of all ways by turns, so that a clock that falls at the
power limit affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from millrace.errors import ConfigError
from millrace.kernels.gpu.tables import Way
from millrace.runtime.kernel_tuning.choice import Costs, Meter, Run
from millrace.runtime.transfer.device_wait import comes_within

TURNS = 5
WARM_TURNS = 1  # before these; they do not count
LEAST_CALLS = 4  # of a graph
TURN_SECONDS = 2e-3  # of a way in a turn, where seconds count
LIMIT = 60.0  # seconds that a turn of a way may take
ENERGY_SECONDS = 0.3  # the same where joules do: the device counts them ten times a second
WARM_CALLS = 2  # before capture: kernels are compiled then

Replay = tuple[Callable[[], object], int]  # plays a graph, and how many calls that is


def by_time() -> Meter:
    """Seconds of a call, on this GPU."""
    return lambda runs: {
        way: statistics.median(times) for way, times in _turns(_replays(runs)).items()
    }


def by_energy(joules: Callable[[], float | None]) -> Meter:
    """Joules of a call, of all of this GPU.

    joules: taken since some time ago; None: the device does not count. Raises ConfigError then.
    """
    if joules() is None:
        raise ConfigError("--by energy: this GPU does not count its energy; use --by time")

    def meter(runs: Mapping[Way, Sequence[Run]]) -> Costs:
        return {way: _joules(replay, joules) for way, replay in _replays(runs).items()}

    return meter


def by_clock(runs: Mapping[Way, Sequence[Run]]) -> Costs:
    """Seconds of a call by the host's clock, where ops run on a CPU."""
    found: Costs = {}
    for way, calls in runs.items():
        calls[0]()
        began = time.perf_counter()
        for call in calls:
            call()
        found[way] = (time.perf_counter() - began) / len(calls)
    return found


def _replays(runs: Mapping[Way, Sequence[Run]]) -> dict[Way, Replay]:
    """A graph of each way: its calls round the copies of the weights."""
    return {way: _captured(calls) for way, calls in runs.items()}


def _captured(calls: Sequence[Run]) -> Replay:
    for _ in range(WARM_CALLS):
        calls[0]()
    count = max(LEAST_CALLS, len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            calls[number % len(calls)]()
    return graph.replay, count


def _turns(replays: Mapping[Way, Replay]) -> dict[Way, list[float]]:
    """Seconds of a call of each way, in every turn that counts."""
    times: dict[Way, list[float]] = {way: [] for way in replays}
    plays = {
        way: max(1, int(TURN_SECONDS / _seconds(replay, 1))) for way, replay in replays.items()
    }
    for turn in range(WARM_TURNS + TURNS):
        for way, replay in replays.items():
            took = _seconds(replay, plays[way]) / replay[1] / plays[way]
            if turn >= WARM_TURNS:
                times[way].append(took)
    return times


def _plays(replay: Replay, seconds: float) -> int:
    """How often it plays in so many seconds."""
    return max(1, int(seconds / _seconds(replay, 1)))


def _seconds(replay: Replay, plays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(plays):
        replay[0]()
    end.record()
    if not comes_within(end, LIMIT):
        raise RuntimeError(f"the GPU has not ended a few calls within {LIMIT:g} s")
    return float(begin.elapsed_time(end)) * 1e-3


def _joules(replay: Replay, joules: Callable[[], float | None]) -> float:
    """Of a call, while the way runs for long enough."""
    plays = _plays(replay, ENERGY_SECONDS)
    before = joules() or 0.0
    _seconds(replay, plays)
    return ((joules() or 0.0) - before) / plays / replay[1]
