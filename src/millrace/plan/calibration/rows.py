"""What a step model says of a measured row."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import msgspec

from millrace.errors import ConfigError
from millrace.model.work import StepShape
from millrace.plan.facts.measured import Row
from millrace.plan.model.memory import fit
from millrace.plan.model.step_model import ApiServer, Description, StepModel
from millrace.plan.predict.load import Load, Settings
from millrace.plan.predict.loops import Replica


def description_of(row: Row) -> Description:
    return Description(
        gpu=row.gpu, model=row.model, engine=row.engine, weights=row.weights,
        draft_head=row.draft_head, kv=row.kv, state=row.state, window=row.window,
        tensor=row.tensor, drafts=row.drafts, max_model_len=row.max_model_len,
    )  # fmt: skip


def load_of(row: Row) -> Load:
    return Load(
        input=row.input, output=row.output, concurrency=row.concurrency, requests=row.requests,
        text=row.text,
    )  # fmt: skip


def settings_of_row(row: Row) -> Settings:
    return Settings(
        max_num_seqs=row.max_num_seqs, max_num_batched_tokens=row.max_num_batched_tokens,
        mixed=row.mixed, apart=row.apart, served=row.served, ranks=row.ranks,
    )  # fmt: skip


@functools.cache
def settings_that_fit(row: Row) -> Settings:
    """With no more sequences than the memory holds. What published figures were reached with has
    room for one, whatever this says."""
    settings = settings_of_row(row)
    if row.max_num_seqs <= row.concurrency / 2:
        return settings  # taken from the figures themselves
    try:
        found = fit(
            description_of(row),
            mean_tokens=row.input + row.output / 2,
            max_num_seqs=row.max_num_seqs,
            max_num_batched_tokens=row.max_num_batched_tokens,
        )
    except ConfigError:
        return settings
    return msgspec.structs.replace(settings, max_num_seqs=max(1, found.max_num_seqs))


def predict(row: Row, rates: Mapping[str, float]) -> float:
    """The row's metric, in its unit, with these rates."""
    server = ApiServer(rates["request_server"], rates["chunk_server"])
    model = StepModel(description_of(row), dict(rates), server=server)
    if row.kind == "step":
        return _step(row, model)
    replica = Replica(model, load_of(row), settings_that_fit(row))
    if row.kind == "users":
        return _at_user_rate(row, replica) * row.copies
    steady = replica.closed(row.concurrency)
    if row.metric in ("total", "output"):
        found = steady.total_tokens
        if row.requests:
            whole = row.requests * (row.input + row.output)
            found = whole / replica.run_seconds(steady, row.concurrency)
        share = row.output / (row.input + row.output) if row.metric == "output" else 1.0
        return found * share * row.copies
    return float(getattr(steady, row.metric)) * 1e3


def _step(row: Row, model: StepModel) -> float:
    s = row.step
    shape = StepShape.of(s.rows, 1 + row.drafts, s.context, s.prompts, s.length, s.start)
    if row.metric == "joules":
        return float(model.joules(shape))
    return float(model.seconds(shape)) * 1e3


def _at_user_rate(row: Row, replica: Replica) -> float:
    """Total tok/s with so many streams that each gets `row.user` tokens a second: by false position
    in logarithms, in which TPOT over streams is nearly straight."""

    def excess(streams: float) -> float:
        return math.log(replica.closed(streams).tpot * row.user)

    low, high = 1.0, 4096.0
    below, above = excess(low), excess(high)
    if below >= 0 or above <= 0:
        return replica.closed(low if below >= 0 else high).total_tokens
    middle = low
    for _ in range(8):
        share = below / (below - above)
        middle = low ** (1 - share) * high**share
        found = excess(middle)
        if abs(found) < 1e-4:
            break
        if found < 0:
            low, below, above = middle, found, above / 2
        else:
            high, above, below = middle, found, below / 2
    return replica.closed(middle).total_tokens
