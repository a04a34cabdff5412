"""How the weights and caches of a model are stored, and how it is split over GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from millrace.errors import ConfigError
from millrace.model.config import ModelConfig

# Bytes of a weight with its scales. W4A16 has a 16-bit scale and a zero point for 128 weights;
# NVFP4 and MXFP4 have an 8-bit scale for 16 and for 32.
WEIGHT_BYTES = {
    "fp32": 4.0, "bf16": 2.0, "fp8": 1.0 + 2 / 128**2, "int4": 0.5 + 2.5 / 128,
    "nvfp4": 0.5 + 1 / 16, "mxfp4": 0.5 + 1 / 32,
}  # fmt: skip
# What a weight of the format is multiplied in. W4A16 is widened first.
COMPUTE = {"fp32": "fp32", "bf16": "bf16", "fp8": "fp8", "int4": "bf16", "nvfp4": "fp4",
           "mxfp4": "fp4"}  # fmt: skip
CACHE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class Formats:
    """Formats by part. weights: of the linear layers of decoder layers; heads, embeddings, norms
    and the gates of recurrent layers are 16-bit. draft_head: of the output head that drafts use.
    kv, state: of the caches. window: rows of the recurrent window; 0: the state is read once and
    written for every token, as engines without the window form do."""

    weights: str = "bf16"
    draft_head: str = "bf16"
    kv: str = "bf16"
    state: str = "fp32"
    window: int = 16
    plain: str = "bf16"

    def __post_init__(self) -> None:
        for name in (self.weights, self.draft_head, self.plain):
            _known(name, WEIGHT_BYTES, "weight format")
        for name in (self.kv, self.state):
            _known(name, CACHE_BYTES, "cache dtype")

    @property
    def compute(self) -> str:
        """The unit that multiplies with the weights of linear layers."""
        return COMPUTE[self.weights]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one replica is spread. tensor: ranks that share every layer. experts: whether whole
    experts are spread over them, instead of a part of every expert."""

    tensor: int = 1
    experts: bool = False


# A part of a weight format's name -> its row of WEIGHT_BYTES.
_BY_NAME = {"int4": "int4", "nvfp4": "nvfp4", "mxfp4": "mxfp4", "fp8": "fp8", "e4m3": "fp8"}


def formats_of(config: ModelConfig, **others: str | int) -> Formats:
    """The formats of a checkpoint, by the format of most of its linear layers; others: fields of
    Formats that the options decide. Raises ConfigError for a format without a known size."""
    plain = "fp32" if config.dtype == "float32" else "bf16"
    weights = plain
    if config.quantization.method != "none":
        name = config.quantization.format.name.lower()
        weights = next((row for part, row in _BY_NAME.items() if part in name), "")
    if not weights:
        raise ConfigError(
            f"no size is known for weights in {config.quantization.format.name}; "
            f"{_listed(WEIGHT_BYTES)} have one"
        )
    found = Formats(weights=weights, plain=plain, draft_head=plain)
    return replace(found, **others)  # type: ignore[arg-type]


def _known(name: str, table: dict[str, float] | dict[str, int], what: str) -> None:
    if name not in table:
        raise ConfigError(f"{what} {name!r} is unknown; {_listed(table)} are known")


def _listed(table: dict[str, str] | dict[str, float] | dict[str, int]) -> str:
    return ", ".join(table)
