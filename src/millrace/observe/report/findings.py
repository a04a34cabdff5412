"""Where the wall is, in words: what limited a phase, and which figures contradict each other.

Each rule says what it saw and what follows. Thresholds are stated with the rules.
"""

from __future__ import annotations

from millrace.observe.report.figures import Figures

FULL = 0.95  # of the KV cache
NEAR_PEAK = 0.6  # of a peak: what tuned kernels reach of it in whole steps
BUSY = 0.85  # of time
POWERED = 0.6  # of the power limit: above what an idle GPU takes
QUIET = 0.05


def walls(f: Figures) -> list[str]:
    """What limited the phase, the most likely first. Never empty."""
    if f.engines == 0:
        return ["No engine was sampled, so nothing is known of the work."]
    found = []
    if f.down > QUIET:
        found.append(
            f"Engines were down or silent for {f.down:.0%} of the time: see their logs first."
        )
    if f.idle:
        return [*found, "No load: no request ran for most of the time."]
    found += _of_the_device(f) + _of_memory(f) + _of_the_fleet(f) + _of_host_and_load(f)
    if not found:
        found.append(_in_between(f))
    return found


def _of_the_device(f: Figures) -> list[str]:
    found = []
    limited = f.power is not None and f.power_limit and f.power.median / f.power_limit > 0.95
    if limited or f.throttled > 0.5:
        assert f.power is not None or f.throttled
        watts = f", {f.power.median:.0f} W in the median" if f.power else ""
        found.append(
            f"Power: the GPUs are at their limit{watts}; fewer joules a token make it faster, not "
            "more work at once."
        )
    if f.mbu is not None and f.mbu > NEAR_PEAK and f.mbu >= (f.mfu or 0.0):
        found.append(
            f"Memory bandwidth: {f.mbu:.0%} of its peak is used; larger batches read weights for "
            "more tokens, and narrower formats read fewer bytes."
        )
    elif f.mfu is not None and f.mfu > NEAR_PEAK:
        found.append(
            f"Compute: {f.mfu:.0%} of the dense peak is used; only less work or a narrower dtype "
            "makes it faster."
        )
    return found


def _of_memory(f: Figures) -> list[str]:
    found = []
    waiting = f.waiting is not None and f.waiting.median >= 1
    if f.kv_usage is not None and f.kv_usage.median > FULL and waiting:
        found.append(
            f"KV cache: {f.kv_usage.median:.0%} of its pages are held while requests wait; more "
            "memory, FP8 keys and values, or shorter requests admit more."
        )
    if f.preemption_rate > 0.1:
        found.append(
            f"Preemptions: {f.preemption_rate:.1f} requests a second are computed again; lower "
            "--max-num-seqs."
        )
    return found


def _of_the_fleet(f: Figures) -> list[str]:
    found = []
    if (f.gateway_queue is not None and f.gateway_queue.median >= 1) and (
        f.waiting is None or f.waiting.median < 1
    ):
        found.append(
            f"The gateway: {f.gateway_queue.median:.0f} requests wait there while none waits at an "
            "engine; a higher --max-concurrent-requests lets them through."
        )
    loads = [(one.output_rate, one.name) for one in f.replicas if one.output_rate is not None]
    if len(loads) > 1:
        (least, idle), (most, busiest) = min(loads), max(loads)
        if most > 1.5 * least and f.running is not None and f.running.median >= 2 * len(loads):
            found.append(
                f"Imbalance: {busiest} makes {most:,.0f} tokens a second, and {idle} {least:,.0f}; "
                "the fleet is as fast as its requests are spread."
            )
    return found


def _of_host_and_load(f: Figures) -> list[str]:
    found = []
    waiting = f.waiting is not None and f.waiting.median >= 1
    if f.busy is not None and f.busy < BUSY and waiting:
        found.append(
            f"The host: requests wait, and a step runs for only {f.busy:.0%} of the time; what is "
            "between steps (scheduler, messages, processors that others use) is the wall."
        )
    if f.host_busy is not None and f.host_busy > 0.9:
        found.append(
            f"Processors: {f.host_busy:.0%} of this host's are busy; clients, servers and engines "
            "compete for them."
        )
    if f.busy is not None and f.busy < BUSY and not waiting:
        found.append(
            f"The load: nothing waits, and a step runs for {f.busy:.0%} of the time; the engines "
            "could take more requests."
        )
    return found


def _in_between(f: Figures) -> str:
    if f.kinds and f.mfu is None:
        return "No peaks are known of this device, so nothing can be said of its limits."
    if f.mfu is None and f.mbu is None:
        return "No counts of work: these engines do not say what their steps compute."
    return (
        f"In between: steps run all the time at {f.mfu or 0:.0%} of the compute peak and "
        f"{f.mbu or 0:.0%} of the memory's. Kernels are short or wait for each other: more "
        "requests at once, or better kernels."
    )


def contradictions(f: Figures) -> list[str]:
    """Figures that cannot all be true."""
    found = []
    share = f.power.median / f.power_limit if f.power and f.power_limit else None
    quiet = (f.mfu or 0.0) < QUIET and (f.mbu or 0.0) < 2 * QUIET
    if share is not None and share > POWERED and f.mfu is not None and quiet:
        found.append(
            f"The GPUs take {share:.0%} of their power, and the steps explain {f.mfu:.0%} of "
            f"compute and {f.mbu or 0:.0%} of memory: another program uses them, or a figure is "
            "wrong."
        )
    if share is not None and share > POWERED and f.tensor_active is not None and (
        f.tensor_active.median < QUIET and (f.dram_active is None or f.dram_active.median < QUIET)
    ):  # fmt: skip
        found.append(
            f"The GPUs take {share:.0%} of their power, and DCGM calls the tensor pipes "
            f"{f.tensor_active.median:.0%} active: its profiling counters are of another time or "
            "device."
        )
    if f.mfu is not None and f.tensor_active is not None:
        seen = f.tensor_active.median
        if f.mfu > 1.5 * seen + 0.05:
            found.append(
                f"The counted work is {f.mfu:.0%} of the peak, and the tensor pipes are active for "
                f"{seen:.0%} of the time: too much work is counted, or the peak is that of another "
                "device."
            )
    for name, value in (("compute", f.mfu), ("memory", f.mbu)):
        if value is not None and value > 1.02:
            found.append(f"{value:.0%} of the peak of {name} is used, which cannot be.")
    if f.busy is not None and f.utilization is not None and f.busy > 0.9 > 2 * f.utilization.median:
        found.append(
            f"A step runs for {f.busy:.0%} of the time, and the driver calls the GPUs "
            f"{f.utilization.median:.0%} busy: other GPUs than those of the engines are sampled."
        )
    return found
