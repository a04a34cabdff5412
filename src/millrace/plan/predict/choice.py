"""The best settings for a load: all that fit are predicted, and each that loses says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec

from millrace.errors import ConfigError
from millrace.hardware.gpus import gpu as find_gpu
from millrace.plan.facts.models import model_config
from millrace.plan.facts.prices import price_of
from millrace.plan.model.memory import formats_for
from millrace.plan.model.step_model import Description
from millrace.plan.predict.cost import million
from millrace.plan.predict.load import Load, settings_of
from millrace.plan.predict.prediction import Deployment, Planner, Prediction

Objective = Literal["throughput", "latency", "cost"]
RANKS = (1, 2, 4, 8)
SEQUENCES = (32, 64, 128, 256, 512)
DRAFTS = (0, 1, 2, 3)
NODE = 8  # GPUs that share a host
# Engines with the window form keep one state a sequence; others one for every draft beside one.
WINDOWS = {"millrace": 16}


class Slo(msgspec.Struct, frozen=True):
    """Most milliseconds; 0: no limit. user: tok/s that a user gets at least."""

    ttft: float = 0.0
    tpot: float = 0.0
    itl_p99: float = 0.0
    user: float = 0.0


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """What may be chosen. gpus: kinds. count: of GPUs at most. weights: formats. drafts, ranks,
    sequences, states: what is tried."""

    gpus: Sequence[str]
    count: int
    weights: Sequence[str] = ("fp8",)
    drafts: Sequence[int] = DRAFTS
    ranks: Sequence[int] = RANKS
    sequences: Sequence[int] = SEQUENCES
    states: Sequence[str] = ("fp32", "bf16")
    engine: str = "millrace"
    max_model_len: int = 4096
    utilization: float = 0.92


class Candidate(msgspec.Struct, frozen=True):
    """Settings with what is predicted of them. dollars: for a million tokens; 0: no price is known.
    why: why it lost; empty for the best."""

    prediction: Prediction
    dollars: float
    why: str = ""

    @property
    def tokens(self) -> float:
        return self.prediction.bars["total_tokens"].value

    @property
    def tpot(self) -> float:
        return self.prediction.steady.tpot


class Choice(msgspec.Struct, frozen=True):
    """best: with bars. pareto: no other has both more throughput a GPU and a shorter TPOT.
    others: what lost, best first. refused: settings that cannot start -> why."""

    best: Candidate
    pareto: list[Candidate]
    others: list[Candidate]
    refused: dict[str, str]
    objective: str


def label(deployment: Deployment) -> str:
    """Settings in few words."""
    d = deployment.description
    found = f"{deployment.replicas} x TP={d.tensor} {d.gpu} {d.weights}, state {d.state}"
    return f"{found}, {d.drafts} drafts, {deployment.settings.max_num_seqs} seqs"


def choose(
    planner: Planner,
    model: str,
    load: Load,
    space: Space,
    slo: Slo = Slo(),  # noqa: B008, frozen
    objective: Objective = "throughput",
    price: Callable[[str], float] | None = None,
) -> Choice:
    """The best of a space. price: dollars a GPU-hour of a kind; None: the table's.

    Raises ConfigError, with the nearest that works, if nothing fits or meets the limits.
    """
    load.check()
    price = price or (lambda name: price_of(name).dollars)
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    for deployment in _deployments(model, load, space):
        try:
            prediction = planner.predict(deployment, load, bars=False)
        except ConfigError as error:
            refused.setdefault(str(error), label(deployment))
            continue
        found.append(Candidate(prediction, _dollars(prediction, price)))
    if not found:
        raise ConfigError(next(iter(refused), f"no settings of {model} are left to try"))
    fine = [one for one in found if not _violation(one, slo)]
    if not fine:
        raise ConfigError(_unreachable(found, slo))
    order = _order(objective)
    ranked = sorted(fine, key=order)
    best = ranked[0]
    exact = planner.predict(best.prediction.deployment, load)
    others = [_lost(one, best, objective) for one in ranked[1:]]
    violating = [
        msgspec.structs.replace(one, why=_violation(one, slo)) for one in found if one not in fine
    ]
    return Choice(
        best=msgspec.structs.replace(best, prediction=exact),
        pareto=_pareto(fine),
        others=others + sorted(violating, key=order),
        refused={name: why for why, name in refused.items()},
        objective=objective,
    )


def _deployments(model: str, load: Load, space: Space) -> Iterator[Deployment]:
    config = model_config(model)
    drafts = [k for k in space.drafts if k == 0 or config.mtp_layers]
    states = space.states if config.num_gdn_layers else space.states[:1]
    ranks = [n for n in space.ranks if n <= space.count and config.num_heads % n == 0]
    kinds = itertools.product(space.gpus, space.weights, ranks, states, drafts, space.sequences)
    for gpu, weights, tensor, state, k, size in kinds:
        replicas = space.count // tensor
        streams = load.concurrency / replicas if load.concurrency else max(space.sequences)
        if size >= 2 * streams and size > min(space.sequences):
            continue  # the same as the next smaller size
        yield Deployment(
            _description(model, gpu, weights, tensor, state, k, space),
            settings_of(space.engine, max_num_seqs=size, ranks=_ranks(space, tensor)),
            replicas,
            space.utilization,
        )


def _ranks(space: Space, tensor: int) -> int:
    """Engines behind one address of an engine that spreads streams itself."""
    return max(1, min(space.count, NODE) // tensor) if space.engine == "vllm" else 1


def _description(
    model: str, gpu: str, weights: str, tensor: int, state: str, drafts: int, space: Space
) -> Description:
    formats = formats_for(find_gpu(gpu), weights)
    fp8_head = weights == "fp8" and space.engine == "millrace"
    return Description(
        gpu=gpu,
        model=model,
        engine=space.engine,
        weights=weights,
        draft_head="fp8" if fp8_head else "bf16",
        kv=formats.kv,
        state=state,
        window=WINDOWS.get(space.engine, 0),
        tensor=tensor,
        experts=tensor > 1 and model_config(model).experts is not None,
        drafts=drafts,
        max_model_len=space.max_model_len,
    )


def _dollars(prediction: Prediction, price: Callable[[str], float]) -> float:
    try:
        hour = price(prediction.deployment.description.gpu) * prediction.deployment.gpus
    except ConfigError:
        return 0.0
    return million(hour, prediction.bars["total_tokens"].value)


def _order(objective: Objective) -> Callable[[Candidate], float]:
    if objective == "latency":
        return lambda one: one.tpot
    if objective == "cost":
        return lambda one: one.dollars or float("inf")
    return lambda one: -one.tokens


def _violation(one: Candidate, slo: Slo) -> str:
    """Which limit the settings exceed, in words; empty if none."""
    steady = one.prediction.steady
    if one.prediction.overload:
        return one.prediction.overload
    limits = (
        ("TTFT", steady.ttft * 1e3, slo.ttft), ("TPOT", steady.tpot * 1e3, slo.tpot),
        ("ITL p99", steady.itl_p99 * 1e3, slo.itl_p99),
    )  # fmt: skip
    for name, value, most in limits:
        if most and value > most:
            return f"{name} {value:.4g} ms is more than {most:g}"
    if slo.user and 1 / steady.tpot < slo.user:
        return f"{1 / steady.tpot:.4g} tok/s a user is less than {slo.user:g}"
    return ""


def _unreachable(found: list[Candidate], slo: Slo) -> str:
    """What comes nearest to limits that nothing meets."""
    tpot = min(found, key=lambda one: one.prediction.steady.tpot)
    ttft = min(found, key=lambda one: one.prediction.steady.ttft)
    least = _violation(tpot, slo) or _violation(ttft, slo)
    return (
        f"no settings meet these limits: {least}; the shortest TPOT is "
        f"{tpot.prediction.steady.tpot * 1e3:.4g} ms ({label(tpot.prediction.deployment)}), the "
        f"shortest TTFT {ttft.prediction.steady.ttft * 1e3:.4g} ms "
        f"({label(ttft.prediction.deployment)}); more GPUs or fewer streams bring both down"
    )


def _lost(one: Candidate, best: Candidate, objective: Objective) -> Candidate:
    if objective == "latency":
        why = f"TPOT {one.tpot / best.tpot - 1:+.1%}"
    elif objective == "cost":
        why = f"cost {one.dollars / best.dollars - 1:+.1%}" if best.dollars else "no price is known"
    else:
        why = f"throughput {one.tokens / best.tokens - 1:+.1%}"
    seqs = one.prediction.deployment.settings.max_num_seqs
    if one.prediction.memory.max_num_seqs < seqs:
        why += f"; {one.prediction.memory.max_num_seqs} of {seqs} sequences fit"
    return msgspec.structs.replace(one, why=why)


def _pareto(found: list[Candidate]) -> list[Candidate]:
    """By throughput a GPU, largest first; of equals one."""
    kept: list[Candidate] = []
    for one in sorted(found, key=lambda c: (-c.tokens / c.prediction.deployment.gpus, c.tpot)):
        if not kept or one.tpot < kept[-1].tpot * 0.999:
            kept.append(one)
    return kept
