"""How a model is cut over the ranks of one tensor-parallel group.

Knows which sizes work and what a rank's share is; how ranks talk is given as functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from millrace.errors import ConfigError
from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.quantize import Quantized
from millrace.model.config import ModelConfig

Collective = Callable[[Tensor], Tensor]
Normed = tuple[Tensor | None, Quantized | None, Tensor]
ReduceNorm = Callable[[Tensor, Tensor, Tensor, float, bool, bool], Normed | None]
TILE = 8  # channels: 16 bytes of bfloat16, what matrix products want rows to be a multiple of


def _alone(x: Tensor) -> Tensor:
    return x


def _never(*given: object) -> None:
    return None


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One rank of `size`. all_reduce: the sum over ranks, the same bits on each, in x's shape.

    gather: the ranks' tensors joined along their last dimension, in rank order. largest: number by
    number the largest of the ranks' int64 tensors, on each rank. reduce_norm, of (x, residual,
    weight, eps, keep, quantized): the sum of x over ranks plus the residual, as `(its norm if keep,
    that quantised if quantized, itself)`; None where nothing does that in one.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Collective = _alone
    gather: Collective = _alone
    largest: Collective = _alone
    reduce_norm: ReduceNorm = _never

    def share(self, total: int) -> tuple[int, int]:
        """This rank's [start, stop) of `total` things, which the size divides."""
        each = total // self.size
        return self.rank * each, (self.rank + 1) * each

    def kv_share(self, heads: int) -> tuple[int, int]:
        """This rank's [start, stop) of the KV heads; with more ranks than heads some share one."""
        if heads >= self.size:
            return self.share(heads)
        head = self.rank * heads // self.size
        return head, head + 1

    def padded_share(self, total: int, unit: int) -> tuple[int, int, int]:
        """This rank's [start, stop) of `total`, cut between units, and the length of all shares.

        Where the units do not divide evenly, the first ranks have one more, and the others' shares
        are to be filled up with zeros.
        """
        units = -(-total // unit)
        each, more = divmod(units, self.size)
        first = self.rank * each + min(self.rank, more)
        count = each + (self.rank < more)
        length = (each + (more > 0)) * unit if self.size > 1 else total
        return min(first * unit, total), min((first + count) * unit, total), length


def mlp_unit(config: ModelConfig, ranks: int, keep_fp8: bool) -> int:
    """Channels of the MLP that stay together: an FP8 block while there is one for each rank."""
    blocks = -(-config.intermediate_size // FP8_BLOCK)
    return FP8_BLOCK if keep_fp8 and blocks >= ranks else TILE


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Raise ConfigError, naming the sizes that work, where the model cannot be cut over `ranks`."""
    reasons = _obstacles(config, ranks)
    if reasons:
        working = [n for n in range(1, config.num_heads + 1) if not _obstacles(config, n)]
        raise ConfigError(
            f"tensor_parallel_size {ranks} cannot share out {', '.join(reasons)}; "
            f"sizes that work: {', '.join(map(str, working))}"
        )


def _obstacles(config: ModelConfig, ranks: int) -> list[str]:
    """What cannot be cut so often. Heads are never cut; the MLP's channels are, with padding."""
    sizes = [
        (config.num_heads, "attention heads"),
        (config.key_heads, "GDN key heads"),
        (config.value_heads, "GDN value heads"),
    ]
    reasons = [f"{total} {what}" for total, what in sizes if total % ranks]
    kv_heads = config.num_kv_heads
    if kv_heads % ranks and ranks % kv_heads:
        reasons.append(f"{kv_heads} KV heads")
    if -(-config.intermediate_size // TILE) < ranks:
        reasons.append(f"intermediate_size {config.intermediate_size} in tiles of {TILE}")
    return reasons
