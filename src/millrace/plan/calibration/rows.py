"""What a step model says of a measured row."""

from __future__ import annotations

from collections.abc import Mapping

from millrace.model.work import StepShape
from millrace.plan.facts.measured import Row
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


def predict(row: Row, rates: Mapping[str, float]) -> float:
    """The row's metric, in its unit, with these rates."""
    server = ApiServer(rates["request_server"], rates["chunk_server"])
    model = StepModel(description_of(row), dict(rates), server=server)
    if row.kind == "step":
        return _step(row, model)
    replica = Replica(model, load_of(row), settings_of_row(row))
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
    """Total tok/s with so many streams that each gets `row.user` tokens a second."""
    low, high = 1.0, 4096.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        if 1 / replica.closed(middle).tpot > row.user:
            low = middle
        else:
            high = middle
    return replica.closed(low).total_tokens
