"""When it pays that one replica computes prompts and another answers them.

For each prompt, answer, format of states and link: the record's bytes and what its move takes, what
as many GPUs do together or apart, and how long a stream waits for a step beside prompts. Nothing is
known of queues: both sides are full, and rows are those that a decode replica holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from millrace.errors import ConfigError
from millrace.model.work import StepShape
from millrace.plan.model.memory import cache_spec
from millrace.plan.model.posterior import Posterior
from millrace.plan.model.profiles import with_rates
from millrace.plan.model.step_model import Description, StepModel

PAGE = 16
# Between a device and its host's memory, GB/s: half of what PCIe 5.0 has in 16 lanes.
HOST_LINK = 28.0
LATENCY = 2e-3  # seconds of a hand-over beside its bytes
MIXED_TOKENS = 1536  # of prompts, in a step with decode rows
STEP_TOKENS = 8192  # of prompts, in a step without
MOST_SLOWER = 0.8  # of the throughput together, that is worth even streams
MORE = 1.05  # times the requests, that are worth a hand-over
EVENER = 2.0  # times that a stream waits longer together, which is worth a hand-over
MOST_ADDED = 0.25  # of a prompt's time, that its hand-over may take

Verdict = Literal["apart", "together"]


class Row(msgspec.Struct, frozen=True):
    """One case. link: GB/s between hosts. bytes: of a record. prompt_s: to compute the prompt;
    move_s: to hand it over. together, apart: requests a second of all GPUs; prefill: of them, those
    that compute prompts. gap_together, gap_apart: seconds between two tokens of a stream beside
    prompts. least_link: GB/s from which the move is short enough; infinite where none is. why: what
    decides."""

    prompt: int
    output: int
    state: str
    link: float
    bytes: int
    prompt_s: float
    move_s: float
    together: float
    apart: float
    prefill: int
    gap_together: float
    gap_apart: float
    least_link: float
    verdict: Verdict
    why: str


class Cases(msgspec.Struct, frozen=True):
    """What is crossed. gpus: of all replicas, each of `Description.tensor`. rows: of a decode
    replica."""

    prompts: Sequence[int]
    outputs: Sequence[int]
    states: Sequence[str]
    links: Sequence[float]
    gpus: int
    rows: int

    def check(self, tensor: int) -> None:
        """Raises ConfigError for numbers that mean nothing."""
        for name in ("prompts", "outputs", "links"):
            if any(value <= 0 for value in getattr(self, name)):
                raise ConfigError(f"--{name}: use numbers above 0")
        if self.gpus < 2 * tensor or self.gpus % tensor:
            raise ConfigError(
                f"--gpus {self.gpus}: two replicas or more of {tensor} GPUs each are compared"
            )
        if self.rows < 1:
            raise ConfigError(f"--rows {self.rows}: use 1 or more")


def table(d: Description, cases: Cases, known: Posterior) -> list[Row]:
    """Raises ConfigError for what nothing runs."""
    cases.check(d.tensor)
    return list(_rows(d, cases, known))


def _rows(d: Description, cases: Cases, known: Posterior) -> Iterator[Row]:
    rates = known.rates(d.engine, d.gpu)
    for state in cases.states:
        for prompt in cases.prompts:
            for output in cases.outputs:
                longest = max(d.max_model_len, prompt + output)
                own = msgspec.structs.replace(d, state=state, max_model_len=longest)
                model = with_rates(own, rates, known)
                for link in cases.links:
                    yield _row(model, cases, prompt, output, link)


def record_bytes(model: StepModel, prompt: int) -> int:
    """Of all ranks."""
    d = model.description
    spec = cache_spec(model.config, d, PAGE)
    pages = -(-(prompt - 1) // PAGE)
    return d.tensor * (pages * spec.page_bytes(d.tensor) + spec.snapshot_bytes(d.tensor))


def _row(model: StepModel, cases: Cases, prompt: int, output: int, link: float) -> Row:
    size = record_bytes(model, prompt)
    alone = _prompt_seconds(model, prompt)
    # Each rank has links of its own to the host's memory.
    host = 2 * size / (HOST_LINK * 1e9 * model.description.tensor)
    move = LATENCY + host + size / (link * 1e9)
    replicas = cases.gpus // model.description.tensor
    together, gap = _together(model, cases.rows, prompt, output)
    seconds = _step(model, cases.rows, prompt + output / 2)
    answer = seconds * output / cases.rows
    prefill = max(range(1, replicas), key=lambda n: min(n / alone, (replicas - n) / answer))
    apart = min(prefill / alone, (replicas - prefill) / answer)
    spare = MOST_ADDED * alone - LATENCY - host
    verdict, why = _verdict(move / alone, apart / (together * replicas), gap / seconds)
    return Row(
        prompt=prompt, output=output, state=model.description.state, link=link, bytes=size,
        prompt_s=alone, move_s=move, together=together * replicas, apart=apart,
        prefill=prefill, gap_together=gap, gap_apart=seconds,
        least_link=size / spare / 1e9 if spare > 0 else math.inf, verdict=verdict, why=why,
    )  # fmt: skip


def _step(model: StepModel, rows: float, context: float, prompts: float = 0.0) -> float:
    """Seconds of a step of decode rows beside so many prompt tokens."""
    shape = StepShape.of(rows, 1.0, context, float(prompts > 0), prompts)
    return float(model.seconds(shape))


def _prompt_seconds(model: StepModel, prompt: int) -> float:
    """Of a prompt that is computed alone, piece by piece."""
    found, start = 0.0, 0
    while start < prompt:
        length = min(STEP_TOKENS, prompt - start)
        shape = StepShape.of(prompts=1.0, length=float(length), start=float(start), last=0.0)
        found += float(model.seconds(shape))
        start += length
    return found


def _together(model: StepModel, rows: int, prompt: int, output: int) -> tuple[float, float]:
    """(requests a second of a replica that does everything, seconds of a step beside prompts)."""
    context = prompt + output / 2
    share = MIXED_TOKENS / prompt  # of a prompt, that a mixed step computes
    mixed = _step(model, rows, context, MIXED_TOKENS)
    plain = _step(model, rows, context)
    tokens = rows * prompt / output  # of prompts for each step, in a steady state
    if tokens >= MIXED_TOKENS:  # prompts are what limits
        return share / mixed, mixed
    part = tokens / MIXED_TOKENS
    return rows / output / (part * mixed + (1 - part) * plain), mixed


def _verdict(move: float, throughput: float, gap: float) -> tuple[Verdict, str]:
    """move: over the prompt's time. throughput: apart over together. gap: together over apart."""
    if move > MOST_ADDED:
        return "together", "the move is long"
    if throughput < MOST_SLOWER:
        return "together", "fewer requests"
    if throughput < MORE and gap < EVENER:
        return "together", "nothing is won"
    return "apart", "more requests" if throughput >= MORE else "even streams"


def print_table(d: Description, cases: Cases, rows: list[Row]) -> None:
    """As a table with a line for all links of a case."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from millrace.plan.text_report import console, short

    links = " / ".join(short(link) for link in cases.links)
    found = Table(
        title=f"Prompts and answers apart: {d.model} in {d.weights}, {cases.gpus} x {d.gpu}, "
        f"{cases.rows} rows; links of {links} GB/s; requests and gaps together / apart",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("prompt", "answer", "state", "MB", "prompt ms", "move ms", "from GB/s"):
        found.add_column(name, justify="right")
    for name in ("requests/s", "gap ms"):
        found.add_column(name, justify="right")
    found.add_column("verdict", no_wrap=True)
    for start in range(0, len(rows), len(cases.links)):
        same = rows[start : start + len(cases.links)]
        one, prefill = same[0], same[0].prefill * d.tensor
        found.add_row(
            str(one.prompt), str(one.output), one.state, short(one.bytes / 1e6),
            short(one.prompt_s * 1e3), " / ".join(short(row.move_s * 1e3) for row in same),
            short(one.least_link) if math.isfinite(one.least_link) else "none",
            f"{short(one.together)} / {short(one.apart)} ({prefill}:{cases.gpus - prefill})",
            f"{short(one.gap_together * 1e3)} / {short(one.gap_apart * 1e3)}",
            "\n".join(dict.fromkeys(f"{row.verdict}: {row.why}" for row in same)),
        )  # fmt: skip
    console().print(found)
