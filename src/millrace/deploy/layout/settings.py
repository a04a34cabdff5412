"""Settings of the replicas: chosen by the planner, or the file's own, which it then checks.

It knows models, GPUs and prices by the planner alone, and starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from millrace.config import EngineArgs
from millrace.deploy.layout.deploy_file import DeployFile
from millrace.errors import ConfigError
from millrace.model_lookup import shipped_models
from millrace.plan.facts.models import model_config
from millrace.plan.facts.prices import GpuPrice, price_of
from millrace.plan.model.memory import fit
from millrace.plan.predict.choice import DRAFTS, RANKS, SEQUENCES, Choice, Space, choose
from millrace.plan.predict.cost import Cost, cost
from millrace.plan.predict.flags import STATES, serve_options
from millrace.plan.predict.load import Load, settings_of
from millrace.plan.predict.prediction import Deployment, Planner, Prediction

STREAMS = 64  # at once, of each replica, where the file names no load
UNPLANNED_SEQUENCES = 64
# Settings that the planner can be told, under its own names.
_NUMBERS = {"max_num_seqs": "sequences", "tensor_parallel_size": "ranks"}


@dataclass(frozen=True, slots=True)
class Settings:
    """options: of the engine, by their names in EngineArgs. ranks: GPUs of a replica. replicas:
    engines over all. planned: what is predicted of them; None: the planner was not asked. price:
    of a GPU-hour; None: none is known, or there is no GPU. notes: what the planner warns of."""

    options: dict[str, Any]
    ranks: int
    replicas: int
    planned: Prediction | None = None
    price: GpuPrice | None = None
    notes: tuple[str, ...] = ()

    @property
    def sequences(self) -> int:
        """Requests that one replica runs at a time."""
        return int(self.options.get("max_num_seqs") or UNPLANNED_SEQUENCES)

    @property
    def cost(self) -> Cost | None:
        """Dollars while the fleet is full."""
        if self.planned is None or self.price is None:
            return None
        return cost(self.planned, self.price.dollars)


def settle(file: DeployFile, planner: Planner | None = None) -> Settings:
    """The settings of a file. Raises ConfigError, with what works, for those that do not fit."""
    _check_names(file)
    ships = file.model in shipped_models()
    if not file.has_gpus or ships or file.shape == "none":
        return _unplanned(file)
    shape = file.shape or file.model
    try:
        model_config(shape)
    except ConfigError as error:
        raise ConfigError(f"model: {error}; name one of the same shape with shape:, or shape: none "
                          "to plan nothing") from None  # fmt: skip
    found = _choose(file, shape, planner or Planner())
    planned = _own(file, found.best.prediction)
    options = {**serve_options(planned.deployment), **file.settings}
    if file.engine == "sglang":
        options = {name: options[name] for name in options if name not in _MILLRACE_ONLY}
    return Settings(
        options=options,
        ranks=planned.deployment.description.tensor,
        replicas=planned.deployment.replicas,
        planned=planned,
        price=_price(file),
        notes=planned.memory.warnings,
    )


_MILLRACE_ONLY = ("mixed_prefill_tokens", "mamba_ssm_cache_dtype", "enable_expert_parallel")


def _check_names(file: DeployFile) -> None:
    known = set(EngineArgs.__struct_fields__) - {"model", "max_model_len"}
    unknown = sorted(set(file.settings) - known)
    if "max_model_len" in unknown:
        raise ConfigError("settings.max_model_len: give it as context")
    if unknown:
        raise ConfigError(
            f"settings: no option {', '.join(unknown)}; they have the names of `millrace serve`'s "
            "flags with underscores; an option of the engine's own goes into arguments"
        )
    try:
        msgspec.convert({"model": file.model, **file.settings}, EngineArgs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings: {error}") from None


def _unplanned(file: DeployFile) -> Settings:
    ranks = int(file.settings.get("tensor_parallel_size", 1))
    options = {"max_model_len": file.context, **file.settings}
    replicas = _wanted(file) or max(1, file.gpus // ranks)
    note = "the planner was not asked: nothing says whether these settings fit"
    notes = (note,) if file.has_gpus and file.shape == "none" else ()
    return Settings(options, ranks, replicas, price=_price(file), notes=notes)


def _wanted(file: DeployFile) -> int:
    """Replicas that the file names; 0: the planner chooses. An autoscaled fleet is planned at its
    largest."""
    if file.split is not None:
        return file.split.prefill + file.split.decode
    return file.replicas or (0 if file.gpus else 1)


def _price(file: DeployFile) -> GpuPrice | None:
    if not file.has_gpus:
        return None
    try:
        return price_of(file.gpu, file.price, file.dollars or None)
    except ConfigError:
        return None


def _choose(file: DeployFile, shape: str, planner: Planner) -> Choice:
    """The best of what the file leaves open. With a number of replicas the fewest ranks that fit
    are taken."""
    given = _given(file.settings)
    replicas = _wanted(file)
    tries = given.get("ranks", RANKS) if replicas else (0,)
    problem: ConfigError | None = None
    for ranks in tries:
        count = replicas * ranks or file.gpus
        space = Space(
            gpus=[file.gpu],
            count=count,
            weights=[file.weights],
            engine=file.engine,
            max_model_len=file.context,
            drafts=given.get("drafts", DRAFTS),
            sequences=given.get("sequences", SEQUENCES),
            states=given.get("states", ("fp32",)),
            ranks=(ranks,) if ranks else given.get("ranks", RANKS),
            utilization=file.settings.get("gpu_memory_utilization", 0.92),
        )
        load = _load(file, replicas or max(1, file.gpus))
        try:
            return choose(planner, shape, load, space, price=lambda _: file.dollars or 1.0)
        except ConfigError as error:
            problem = problem or error
    assert problem is not None
    raise ConfigError(f"the planner: {problem}")


def _given(settings: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The part of a space that settings leave no choice in."""
    found: dict[str, tuple[Any, ...]] = {
        name: (settings[key],) for key, name in _NUMBERS.items() if key in settings
    }
    if "speculative_config" in settings:
        drafts = (settings["speculative_config"] or {}).get("num_speculative_tokens", 1)
        found["drafts"] = (drafts if isinstance(drafts, int) else 1,)
    if "mamba_ssm_cache_dtype" in settings:
        short = {long: name for name, long in STATES.items()}
        found["states"] = (short.get(settings["mamba_ssm_cache_dtype"], "fp32"),)
    return found


def _load(file: DeployFile, replicas: int) -> Load:
    part = file.load
    concurrency = part.concurrency
    if not concurrency and not part.rate:
        concurrency = STREAMS * replicas
    found = Load(input=part.input, output=part.output, concurrency=concurrency, rate=part.rate,
                 text=part.text)  # fmt: skip
    try:
        found.check()
    except ConfigError as error:
        raise ConfigError(f"load: {error}") from None
    return found


def _own(file: DeployFile, chosen: Prediction) -> Prediction:
    """The choice with the settings that only memory depends on. Raises ConfigError if they do not
    fit."""
    tokens = file.settings.get("max_num_batched_tokens")
    if tokens is None:
        return chosen
    deployment = chosen.deployment
    settings = settings_of(
        file.engine, **{**msgspec.structs.asdict(deployment.settings),
                        "max_num_batched_tokens": tokens},
    )  # fmt: skip
    changed: Deployment = replace(deployment, settings=settings)
    memory = fit(
        changed.description,
        mean_tokens=chosen.load.context,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=tokens,
        utilization=changed.utilization,
    )
    return replace(chosen, deployment=changed, memory=memory)
