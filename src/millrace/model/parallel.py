"""How a model is split over the ranks of a tensor-parallel group.

It knows which sizes are possible and which share each rank has. The collectives are given to it as
functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from millrace.errors import ConfigError
from millrace.kernels.quantize import Quantized
from millrace.model.config import ModelConfig

Collective = Callable[[Tensor], Tensor]
NormResult = tuple[Tensor | None, Quantized | None, Tensor]
ReduceNorm = Callable[[Tensor, Tensor, Tensor, float, bool, bool], NormResult | None]
TILE = 8  # channels: 16 bytes of bfloat16; GEMMs need rows of a multiple of it


def _identity(x: Tensor) -> Tensor:
    return x


def _not_fused(*given: object) -> None:
    return None


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One rank of `size`. all_reduce: the sum over ranks in x's shape, the same bits on each.

    all_gather: the ranks' tensors concatenated in the last dimension, in rank order.
    all_reduce_max: the elementwise maximum of int64 tensors. all_reduce_norm(x, residual, weight,
    eps, keep, quantized): for s = the sum of x over ranks + residual, in one kernel, `(norm of s if
    keep, its quantized form if quantized, s)`; None if no such kernel is in use. whole_experts: a
    rank has some of the experts in full (expert parallelism), not a part of every expert.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Collective = _identity
    all_gather: Collective = _identity
    all_reduce_max: Collective = _identity
    all_reduce_norm: ReduceNorm = _not_fused
    whole_experts: bool = False

    def share(self, total: int) -> tuple[int, int]:
        """This rank's [start, stop) of `total`, which the size divides."""
        each = total // self.size
        return self.rank * each, (self.rank + 1) * each

    def uneven_share(self, total: int) -> tuple[int, int]:
        """This rank's [start, stop) of any `total`; it may be empty."""
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def kv_share(self, heads: int) -> tuple[int, int]:
        """This rank's [start, stop) of the KV heads; with more ranks than heads, ranks share
        heads."""
        if heads >= self.size:
            return self.share(heads)
        head = self.rank * heads // self.size
        return head, head + 1

    def padded_share(self, total: int, unit: int) -> tuple[int, int, int]:
        """This rank's [start, stop) of `total`, split between units, and the length of every share.

        If the units do not divide evenly, the first ranks have one more, and the shares of the
        others must be padded with zeros.
        """
        units = -(-total // unit)
        each, more = divmod(units, self.size)
        first = self.rank * each + min(self.rank, more)
        count = each + (self.rank < more)
        length = (each + (more > 0)) * unit if self.size > 1 else total
        return min(first * unit, total), min((first + count) * unit, total), length


def mlp_unit(channels: int, ranks: int, block: int) -> int:
    """Channels of an MLP that are never split: a block of the weights' format, if there is one for
    each rank; else a tile."""
    return block if block > 1 and -(-channels // block) >= ranks else TILE


def check_ranks(config: ModelConfig, ranks: int, whole_experts: bool = False) -> None:
    """Raise ConfigError, with the sizes that work, if the model cannot be split over `ranks`.

    whole_experts: by expert parallelism.
    """
    reasons = _obstacles(config, ranks, whole_experts)
    if not reasons:
        return
    advice = f"sizes that work: {_working(config, whole_experts)}"
    if config.experts is not None and not whole_experts:
        advice += f"; with --enable-expert-parallel: {_working(config, whole_experts=True)}"
    raise ConfigError(f"tensor_parallel_size {ranks} cannot split {', '.join(reasons)}; {advice}")


def _working(config: ModelConfig, whole_experts: bool) -> str:
    sizes = range(1, config.num_heads + 1)
    return ", ".join(str(n) for n in sizes if not _obstacles(config, n, whole_experts))


def _obstacles(config: ModelConfig, ranks: int, whole_experts: bool) -> list[str]:
    """What cannot be split over `ranks`. Heads are never split; MLP channels are, with
    padding; those of experts without."""
    sizes = [
        (config.num_heads, "attention heads"),
        (config.key_heads, "GDN key heads"),
        (config.value_heads, "GDN value heads"),
    ]
    experts, widths = config.experts, [(config.intermediate_size, "intermediate_size")]
    if experts is not None and whole_experts:
        sizes.append((experts.count, "experts"))
    elif experts is not None:
        widths.append((experts.shared_width, "shared_expert_intermediate_size"))
    reasons = [f"{total} {what}" for total, what in sizes if total % ranks]
    kv_heads = config.num_kv_heads
    if kv_heads % ranks and ranks % kv_heads:
        reasons.append(f"{kv_heads} KV heads")
    if experts is not None and not whole_experts:
        unit = max(config.quantization.format.block, TILE)
        if ranks > 1 and experts.width % (unit * ranks):
            reasons.append(f"moe_intermediate_size {experts.width} in blocks of {unit}")
    for width, name in widths:
        if width and -(-width // TILE) < ranks:
            reasons.append(f"{name} {width} in tiles of {TILE}")
    return reasons
