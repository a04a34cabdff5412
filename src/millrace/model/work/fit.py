"""What a model needs of each GPU, for any number of them, before anything is loaded.

It knows sizes of weights and caches from the model's description, no device and no files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from millrace.errors import ConfigError
from millrace.model.cache_spec import CacheSpec
from millrace.model.config import ModelConfig
from millrace.model.parallel import check_ranks
from millrace.model.work import Formats, Layout, formats_of, weight_bytes

RANKS = (1, 2, 4, 8)
GiB = 1 << 30


@dataclass(frozen=True, slots=True)
class RankNeed:
    """What one rank of a layout needs, in bytes. sequence: of a sequence of the longest length."""

    layout: Layout
    weights: float
    sequence: float

    @property
    def bytes(self) -> float:
        return self.weights + self.sequence

    @property
    def name(self) -> str:
        experts = " with --enable-expert-parallel" if self.layout.experts else ""
        return f"{self.layout.tensor}{experts}"


def formats_in_memory(config: ModelConfig, dtype: str, kept: bool) -> Formats:
    """The formats of weights that are loaded in `dtype`; kept: quantized ones stay so. Raises
    ConfigError for a format of unknown size."""
    plain = "fp32" if dtype == "float32" else "bf16"
    found = formats_of(config, plain=plain, draft_head=plain)
    quantized = config.quantization.method != "none" and kept
    return found if quantized else replace(found, weights=plain)


def rank_needs(
    config: ModelConfig, formats: Formats, spec: CacheSpec, length: int, *, drafts: bool
) -> list[RankNeed]:
    """The needs of 1, 2, 4 and 8 ranks, where the model can be split over them: by width, or with
    whole experts where only that is possible. length: tokens of the longest sequence."""
    found = []
    for ranks in RANKS:
        layout = _layout(config, ranks)
        if layout is None:
            continue
        pages = -(-length // spec.options.page_size)
        sequence = pages * spec.page_bytes(ranks) + spec.slot_bytes(ranks)
        weights = weight_bytes(config, formats, layout, drafts=drafts)
        found.append(RankNeed(layout, weights, sequence))
    return found


def _layout(config: ModelConfig, ranks: int) -> Layout | None:
    for whole in (False, True) if config.experts is not None else (False,):
        try:
            check_ranks(config, ranks, whole)
        except ConfigError:
            continue
        return Layout(ranks, whole)
    return None


def summary(needs: list[RankNeed], room: float, gpu: str) -> str:
    """What each number of ranks needs, and which of them fit into the `room` of a GPU, in bytes."""
    listed = [
        f"{need.name}: {need.weights / GiB:.1f} + {need.sequence / GiB:.1f} GiB" for need in needs
    ]
    fitting = [need.name for need in needs if need.bytes <= room]
    fits = ", ".join(fitting) if fitting else "none of them"
    return (
        f"weights and one longest sequence on each rank of {'; '.join(listed)}; "
        f"of {gpu} {room / GiB:.1f} GiB may be used: {fits} fit"
    )


def problem(needs: list[RankNeed], layout: Layout, weights: float, free: float) -> str | None:
    """Why weights of so many bytes a rank do not fit into `free` bytes, and what does."""
    if weights <= free:
        return None
    fitting = [n.name for n in needs if n.layout.tensor > layout.tensor and n.bytes <= free]
    advice = f"tensor_parallel_size {' or '.join(fitting)} fits" if fitting else "more GPUs than 8"
    return (
        f"the weights take {weights / GiB:.1f} GiB on a rank of {layout.tensor}, and "
        f"{free / GiB:.1f} GiB of this GPU are free; {advice}"
    )
