"""How long a step takes: rooflines with measured efficiencies, launches, host, sums over ranks.

A step model is for one engine on one kind of GPU, with one model, its formats and its layout. It
takes floats, or numpy arrays of several steps at once. It knows no queue and no request.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from millrace.errors import ConfigError
from millrace.hardware.gpus import Gpu
from millrace.hardware.gpus import gpu as find_gpu
from millrace.model.config import ModelConfig
from millrace.model.work import Formats, Layout, Part, StepShape, Work, step_work
from millrace.plan.facts.models import model_config
from millrace.plan.model.rates import OVERLAP

# part of a step's work -> (parameter of its FLOPs, parameter of its bytes)
_EFFICIENCIES = {
    "linear": ("gemm", "stream"),
    "experts": ("grouped", "expert_stream"),
    "draft_layer": ("gemm", "stream"),
    "heads": ("gemm", "stream"),
    "states": ("attention", "states"),
    "recurrence": ("recurrence", "pointwise"),
    "kv": ("attention", "kv"),
    "attention": ("attention", "kv"),
    "pointwise": ("gemm", "pointwise"),
    "sampling": ("gemm", "pointwise"),
}
# Energy of a FLOP in another unit, relative to FP8.
_ENERGY = {"fp4": 0.55, "fp8": 1.0, "bf16": 1.9, "fp32": 8.0}
PICO = 1e-12


class StepTimes(NamedTuple):
    """Seconds. host: planning, launching and reading back, in series on the host. device: from the
    first kernel to the last."""

    host: Any
    device: Any


@dataclass(frozen=True, slots=True)
class ApiServer:
    """Seconds of the server process, in series: for a request, for a streamed chunk; and of a
    gateway for a chunk."""

    request_seconds: float = 1e-3
    chunk_seconds: float = 30e-6
    gateway_chunk_seconds: float = 35e-6


@dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds until an engine answers. cold: nothing is compiled yet."""

    cold: float = 70.0
    warm: float = 12.0


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What a step model is for. weights .. window: as in `model.work.Formats`. tensor,
    experts: as in `model.work.Layout`."""

    gpu: str
    model: str
    engine: str = "millrace"
    weights: str = "fp8"
    draft_head: str = "fp8"
    kv: str = "fp8"
    state: str = "fp32"
    window: int = 16
    tensor: int = 1
    experts: bool = False
    drafts: int = 0
    max_model_len: int = 4096

    @property
    def formats(self) -> Formats:
        return Formats(self.weights, self.draft_head, self.kv, self.state, self.window)

    @property
    def layout(self) -> Layout:
        return Layout(self.tensor, self.experts)


@dataclass(frozen=True, slots=True)
class StepModel:
    """rates: every parameter of `rates.PARAMETERS`. uncertainty: relative standard deviation of a
    step's time. jitter: of a single step around it. sources: for each rate, what it rests on."""

    description: Description
    rates: dict[str, float]
    uncertainty: float = 0.15
    jitter: float = 0.0
    server: ApiServer = ApiServer()
    start_up: StartUp = StartUp()
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return _resolved(self.description).config

    @property
    def gpu(self) -> Gpu:
        return _resolved(self.description).gpu

    def work(self, shape: StepShape) -> Work:
        """What a step computes and moves on one rank."""
        found = _resolved(self.description)
        return step_work(found.config, shape, found.formats, found.layout, self.description.drafts)

    def times(self, shape: StepShape) -> StepTimes:
        """Seconds of a step on the host and on the device."""
        return StepTimes(self.host(shape), sum(self.parts(shape).values()))

    def seconds(self, shape: StepShape) -> Any:
        """Seconds from one step's end to the next one's, if the next is planned meanwhile: what the
        device waits for in each step is in it."""
        host, device = self.times(shape)
        return host + device

    def host(self, shape: StepShape) -> Any:
        """Seconds that a step waits for the host. Some engines copy every row's block table, one
        entry for 16 tokens of the longest context, to the device at every step."""
        rates, rows = self.rates, shape.decode_rows + shape.prompts
        found = rates["step_host"] + rates["token_host"] * (shape.decode_tokens + shape.prompts)
        further = max(0, self.description.drafts - 1)
        found = found + rates["draft_host"] * further * (shape.sampled_rows > 0)
        if self.description.engine == "vllm":
            found = found + BLOCK_TABLE_SECONDS * self.description.max_model_len / 16 * rows
        return found

    def parts(self, shape: StepShape) -> dict[str, Any]:
        """Seconds of a step on the device, by part."""
        d, config, work = self.description, self.config, self.work(shape)
        slower = self.rates["slowdown"]
        found = {
            name: self._seconds(part, *_EFFICIENCIES[name]) * slower
            for name, part in work.parts.items()
            if name != "sums"
        }
        layers = config.num_layers + d.drafts * (config.mtp_layers > 0)
        found["launches"] = self.rates["launches"] * slower * layers * (shape.tokens > 0)
        found["sums"] = self._sums(work.parts["sums"])
        return found

    def _seconds(self, part: Part, compute: str, memory: str) -> Any:
        gpu, rates = self.gpu, self.rates
        slow = part.flops / (gpu.rate(part.unit) * rates[compute])
        moved = part.bytes / (gpu.bytes_per_second * rates[memory])
        return (slow**OVERLAP + moved**OVERLAP) ** (1 / OVERLAP)

    def _sums(self, part: Part) -> Any:
        """All-reduce: a latency that grows with the ranks, and each byte over the link twice but
        for a rank's own share."""
        ranks = self.description.tensor
        if ranks == 1:
            return 0.0
        latency = self.rates["sum_latency"] * (ranks / 2) ** 0.7
        if not self.gpu.nvlink:
            latency *= SLOW_LINK
        rate = self.gpu.link_gb_s * 1e9 * self.rates["sum_rate"]
        moved = 2 * (ranks - 1) / ranks * part.message_bytes
        return part.messages * latency + moved / rate

    def joules(self, shape: StepShape) -> Any:
        """Energy of a step on all ranks: idle power, FLOPs and bytes; at most the power limit."""
        d, work = self.description, self.work(shape)
        flop, byte = self.rates["energy_flop"] * PICO, self.rates["energy_byte"] * PICO
        dynamic: Any = 0.0
        for part in work.parts.values():
            dynamic = dynamic + part.flops * flop * _ENERGY[part.unit] + part.bytes * byte
        seconds = self.seconds(shape)
        idle = self.gpu.idle_watts * seconds
        limit = self.gpu.watts * seconds
        total = idle + dynamic
        return d.tensor * (total * (total <= limit) + limit * (total > limit))

    # --- files ----------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> StepModel:
        """What `save` wrote. Raises ConfigError if the file is none."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(
                f"{path}: no step model ({error}); `millrace plan calibrate` writes one"
            ) from None


@dataclass(frozen=True, slots=True)
class _Resolved:
    config: ModelConfig
    gpu: Gpu
    formats: Formats
    layout: Layout


@functools.lru_cache(maxsize=1024)
def _resolved(d: Description) -> _Resolved:
    return _Resolved(model_config(d.model), find_gpu(d.gpu), d.formats, d.layout)


BLOCK_TABLE_SECONDS = 4e-9  # an entry of 4 bytes at 1 GB/s, numpy and PCIe together
SLOW_LINK = 3.0  # latency of a sum where ranks do not read each other's memory
