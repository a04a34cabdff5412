"""How much a fleet serves: users, requests and tokens by nodes, days with a load curve, batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from millrace.errors import ConfigError
from millrace.plan.predict.load import Load
from millrace.plan.predict.prediction import Bar, Deployment, Planner

# Share of one node's throughput that each node keeps in a fleet, measured behind a plain service at
# 1, 2, 4, 8 and 12 nodes: 100, 99.7, 98.6, 97.1, 96.5%.
SCALING_LOSS = 0.0143  # a natural logarithm of nodes
HOURS = 24
# Share of the day's peak, hour by hour, of a service with one country's users.
OFFICE_DAY = (
    0.05, 0.03, 0.02, 0.02, 0.02, 0.04, 0.10, 0.25, 0.55, 0.85, 1.00, 0.97,
    0.85, 0.90, 0.97, 0.93, 0.80, 0.60, 0.40, 0.30, 0.25, 0.20, 0.14, 0.08,
)  # fmt: skip


class NodeRow(msgspec.Struct, frozen=True):
    """Of so many nodes. users: streams at once. requests, tokens: a second."""

    nodes: int
    gpus: int
    users: float
    requests: Bar
    tokens: Bar


class Day(msgspec.Struct, frozen=True):
    """A day under a load curve. fixed: GPU-hours if the fleet stays as large as the peak needs.
    scaled: if it follows the load each hour. starts: of replicas. to_zero: hours without any.
    waits: seconds that the first request after such an hour waits."""

    peak_replicas: int
    fixed: float
    scaled: float
    starts: int
    to_zero: int
    waits: float
    utilisation: float


class BatchRun(msgspec.Struct, frozen=True):
    """A batch. hours: with its 80% bar; dollars likewise."""

    requests: float
    replicas: int
    gpus: int
    hours: Bar
    dollars: Bar


def efficiency(nodes: int) -> float:
    """Share of one node's throughput that each of so many keeps."""
    return 1 - SCALING_LOSS * math.log(nodes)


def node_table(
    planner: Planner, node: Deployment, load: Load, nodes: Sequence[int]
) -> list[NodeRow]:
    """load: of one node."""
    one = planner.predict(node, load)
    return [
        NodeRow(
            nodes=count,
            gpus=count * node.gpus,
            users=count * load.concurrency,
            requests=one.bars["requests"].times(count * efficiency(count)),
            tokens=one.bars["total_tokens"].times(count * efficiency(count)),
        )
        for count in nodes
    ]


def day(
    planner: Planner,
    one: Deployment,
    load: Load,
    peak: float,
    curve: Sequence[float] = OFFICE_DAY,
    target: float = 0.8,
) -> Day:
    """one: a replica. peak: requests a second in the busiest hour. curve: shares of the peak, one
    for each hour. target: how full replicas may be; below 0.5% of a replica there is none.

    Raises ConfigError for a curve that is none.
    """
    if len(curve) != HOURS or min(curve) < 0 or max(curve) <= 0:
        raise ConfigError(f"a load curve has {HOURS} shares of the peak, none below 0")
    full = msgspec.structs.replace(
        load, rate=0.0, concurrency=float(one.settings.max_num_seqs), requests=0.0
    )
    each = planner.predict(one, full, bars=False).bars["requests"].value * target
    wanted = [peak * share / each for share in curve]
    counts = [0 if need < 0.005 else math.ceil(need) for need in wanted]
    model = planner.model(one.description)
    ups = (max(0, b - a) for a, b in zip([counts[-1], *counts], counts, strict=False))
    starts = sum(ups)
    scaled = sum(counts) + starts * model.start_up.warm / 3600
    return Day(
        peak_replicas=max(counts),
        fixed=float(max(counts) * HOURS * one.gpus),
        scaled=scaled * one.gpus,
        starts=starts,
        to_zero=counts.count(0),
        waits=model.start_up.warm,
        utilisation=sum(wanted) * target / sum(counts) if sum(counts) else 0.0,
    )


def batch(
    planner: Planner, fleet: Deployment, load: Load, requests: float, dollars: float
) -> BatchRun:
    """requests: of the batch. dollars: a GPU-hour. Starts are warm."""
    run = msgspec.structs.replace(load, requests=requests)
    found = planner.predict(fleet, run)
    seconds = found.bars["requests"].inverse(requests)
    start = planner.model(fleet.description).start_up.warm
    hours = Bar(*((value + start) / 3600 for value in (seconds.value, seconds.low, seconds.high)))
    return BatchRun(requests, fleet.replicas, fleet.gpus, hours, hours.times(dollars * fleet.gpus))
