"""How a model is cut over the ranks of one tensor-parallel group.

Knows which sizes divide and what a rank's share is; how ranks talk is given as two functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from millrace.errors import ConfigError
from millrace.model.config import FP8_BLOCK, ModelConfig

Collective = Callable[[Tensor], Tensor]


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One rank of `size`. all_reduce: the sum over ranks, the same bits on each, in x's shape.

    gather: the ranks' tensors joined along their last dimension, in rank order.
    """

    rank: int = 0
    size: int = 1
    all_reduce: Collective = _alone
    gather: Collective = _alone

    def share(self, total: int) -> tuple[int, int]:
        """This rank's [start, stop) of `total` things, which the size divides."""
        each = total // self.size
        return self.rank * each, (self.rank + 1) * each


def check_ranks(config: ModelConfig, ranks: int, keep_fp8: bool) -> None:
    """Raise ConfigError, naming the sizes that work, where the model cannot be cut over `ranks`."""
    reasons = _obstacles(config, ranks, keep_fp8)
    if reasons:
        limit = max(ranks, config.num_heads)
        working = [n for n in range(1, limit + 1) if not _obstacles(config, n, keep_fp8)]
        raise ConfigError(
            f"tensor_parallel_size {ranks} does not divide {', '.join(reasons)}; "
            f"sizes that work: {', '.join(map(str, working))}"
        )


def _obstacles(config: ModelConfig, ranks: int, keep_fp8: bool) -> list[str]:
    sizes = [
        ("attention heads", config.num_heads),
        ("KV heads", config.num_kv_heads),
        ("GDN key heads", config.key_heads),
        ("GDN value heads", config.value_heads),
        ("intermediate_size", config.intermediate_size),
    ]
    reasons = [f"{total} {what}" for what, total in sizes if total % ranks]
    if not reasons and keep_fp8:
        widths = [
            ("intermediate_size", config.intermediate_size),
            ("key and value width", config.num_kv_heads * config.head_dim),
            ("query width", config.num_heads * config.head_dim),
            ("GDN key width", config.key_heads * config.key_dim),
            ("GDN value width", config.value_heads * config.value_dim),
        ]
        reasons = [
            f"{what} {total} into blocks of {FP8_BLOCK}"
            for what, total in widths
            if total // ranks % FP8_BLOCK
        ]
    return reasons
