"""The write-up's path as a preset: its four phases, what it measured, and what is planned of them.

The write-up had eight GPUs; with fewer, parallelism is as wide as there are GPUs and its figures
are scaled by their number.
"""

from __future__ import annotations

import msgspec

from millrace.errors import ConfigError
from millrace.hardware.gpus import gpu as find_gpu
from millrace.plan.model.memory import formats_for
from millrace.plan.model.step_model import Description
from millrace.plan.predict.load import Load, settings_of
from millrace.plan.predict.prediction import Bar, Deployment, Planner
from millrace.plan.presets import write_up_load
from millrace.tune.planner_seeds import nearest
from millrace.tune.search.proposals import Seed
from millrace.tune.space.knobs import Settings, Space, Value, copies_knob

NODE = 8  # GPUs of the write-up's node
_EARLY_STREAMS = 1000.0  # in flight in its first phase, by its own figures of one engine


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the write-up's table. wide: one model on all GPUs, else one a GPU. total: its tok/s.
    note: what else it says."""

    name: str
    total: float
    wide: bool = False
    kv: str = "bf16"
    drafts: int = 1
    length: int = 131072
    utilization: float = 0.92
    text: str = "policies"
    note: str = ""


PHASES = (
    Phase(name="1  one model on all GPUs", total=9_500, wide=True, drafts=0),
    Phase(name="1  the same with MTP-1", total=22_300, wide=True),
    Phase(name="2  one model a GPU, 131,072 tokens", total=74_848),
    Phase(name="3  4,096 tokens", total=85_509, length=4096),
    Phase(name="4  FP8 KV, MTP-1, 2,560 tokens", total=96_023, kv="fp8", length=2560),
    Phase(name="4  MTP-2", total=90_567, kv="fp8", length=2560, drafts=2, text="policies-deep"),
    Phase(name="4  no MTP", total=66_021, kv="fp8", length=2560, drafts=0),
    Phase(
        name="4  MTP-1, memory 0.95",
        total=95_391,
        kv="fp8",
        length=2560,
        utilization=0.95,
        note="908 requests failed",
    ),
)


class PlannedPhase(msgspec.Struct, frozen=True, kw_only=True):
    """A phase with what is predicted. total: tok/s with its bar, None where it does not fit, and
    why. there: what the write-up measured, scaled to so many GPUs."""

    phase: Phase
    total: Bar | None
    there: float
    why: str = ""


def planned(gpu: str, count: int, engine: str) -> list[PlannedPhase]:
    """Every phase on `count` GPUs, by the planner."""
    planner = Planner()
    rows = []
    for phase in PHASES:
        there = phase.total * count / NODE
        try:
            found = planner.predict(_deployment(phase, gpu, count, engine), _load(phase, count))
        except ConfigError as error:
            rows.append(PlannedPhase(phase=phase, total=None, there=there, why=str(error)))
            continue
        rows.append(PlannedPhase(phase=phase, total=found.bars["total_tokens"], there=there))
    return rows


def _load(phase: Phase, count: int) -> Load:
    load = write_up_load()
    streams = _EARLY_STREAMS if phase.wide else load.concurrency
    return msgspec.structs.replace(load, concurrency=streams * count / NODE, text=phase.text)


def _deployment(phase: Phase, gpu: str, count: int, engine: str) -> Deployment:
    own = engine == "millrace"
    formats = formats_for(find_gpu(gpu), "fp8")
    description = Description(
        gpu=gpu,
        model="qwen3.5-27b",
        engine=engine,
        weights="fp8",
        draft_head="fp8" if own else "bf16",
        kv=formats.kv if phase.kv == "fp8" else "bf16",
        window=16 if own else 0,
        tensor=count if phase.wide else 1,
        drafts=phase.drafts,
        max_model_len=phase.length,
    )
    settings = settings_of(
        engine,
        max_num_batched_tokens=16384,
        max_num_seqs=512 if phase.wide else (256 if own else 1024),
        ranks=1 if own or phase.wide else count,
    )
    return Deployment(description, settings, 1 if phase.wide else count, phase.utilization)


def planned_table(rows: list[PlannedPhase], gpu: str, count: int, engine: str) -> list[list[str]]:
    """The write-up's table with ours beside it; the first row has the headings."""
    there = "the write-up" if count == NODE else f"the write-up x {count}/{NODE}"
    cells = [["phase", f"{engine} on {count} x {gpu}, tok/s", "80% bar", there, "ratio", ""]]
    for row in rows:
        if row.total is None:
            cells.append([row.phase.name, "does not fit", "", f"{row.there:,.0f}", "", row.why])
            continue
        bar = row.total
        cells.append(
            [
                row.phase.name,
                f"{bar.value:,.0f}",
                f"{bar.low:,.0f} to {bar.high:,.0f}",
                f"{row.there:,.0f}",
                f"{bar.value / row.there:.2f}",
                row.phase.note and f"there: {row.phase.note}",
            ]
        )
    return cells


def phase_seeds(space: Space) -> list[Seed]:
    """The phases as settings of a space, in order; those that come to the same stand once."""
    seeds = []
    seen: set[str] = set()
    for phase in PHASES:
        settings = space.normal(_phase_settings(phase, space))
        key = msgspec.json.encode(settings).decode()
        if key not in seen:
            seen.add(key)
            seeds.append(Seed(settings=settings, source="phase", why=phase.name))
    return seeds


def _phase_settings(phase: Phase, space: Space) -> Settings:
    wanted: dict[str, Value] = {
        "tensor_parallel_size": space.devices if phase.wide else 1,
        copies_knob(space): 1 if phase.wide else space.devices,
        "max_num_seqs": 512 if phase.wide else 1024,
        "max_num_batched_tokens": 16384,
        "kv_cache_dtype": "fp8_e4m3" if phase.kv == "fp8" else None,
        "drafts": phase.drafts,
        "max_model_len": phase.length,
        "gpu_memory_utilization": phase.utilization,
    }
    return {
        name: None if value is None else nearest(space[name], value)
        for name, value in wanted.items()
        if name in space
    }


def phase_named(name: str) -> Phase | None:
    """A phase by its name."""
    return next((phase for phase in PHASES if phase.name == name), None)
