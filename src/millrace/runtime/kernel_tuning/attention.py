"""Attention of decode rows: how many keys a step of the kernel reads, with how many warps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from millrace.kernels.attention import attend_decode
from millrace.kernels.batch import DecodeRows, KVCache
from millrace.kernels.gpu.attention import decode
from millrace.kernels.gpu.attention.decode import Blocks
from millrace.kernels.gpu.tables import Shape, Way
from millrace.runtime.kernel_tuning.choice import Problem, Run
from millrace.runtime.kernel_tuning.products import device, dtype

BLOCKS = [(32, 2, 5), (64, 4, 3), (32, 4, 3), (64, 4, 2), (64, 2, 3), (128, 4, 2), (32, 2, 3)]
ERROR = 1e-2  # of results in bfloat16
CACHED = {1: torch.float8_e4m3fn, 2: torch.bfloat16}  # by the bytes of a number


class Load(NamedTuple):
    """Rows of so many keys each."""

    rows: int
    keys: int


WHOLE, SPLIT = Load(256, 2048), Load(8, 16384)  # so that keys are not, and are, cut into parts


class DecodeAttention:
    """Shapes: as `decode.shape_of` tells them, and whether keys are cut into parts."""

    name = decode.SECTION

    def __init__(
        self, shapes: Sequence[Shape], kv_heads: int, page: int,
        loads: tuple[Load, Load] = (WHOLE, SPLIT),
    ) -> None:  # fmt: skip
        """kv_heads: of a rank. page: tokens of one."""
        self._shapes, self._kv_heads, self._page, self._loads = shapes, kv_heads, page, loads

    def shapes(self) -> Sequence[Shape]:
        return [(*shape, split) for shape in self._shapes for split in (0, 1)]

    def sizes(self, shape: Shape) -> Sequence[int]:
        return [1]  # the choice goes by the shape alone

    def ways(self, shape: Shape, size: int) -> list[Way]:
        rule = decode.block_rule(bool(shape[4]), shape[2] == 1 and _is_power(shape[1]))
        return list(dict.fromkeys([tuple(rule), *BLOCKS]))

    def prepare(self, shape: Shape) -> Callable[[int], Problem]:
        group, dim, size, width, split = shape
        load = self._loads[split]
        cache, table = self._cache(load, width, dim, CACHED[size])
        starts = torch.full((load.rows,), load.keys, device=device())
        slots = torch.arange(1, load.rows + 1, device=device())
        rows = DecodeRows(slots, starts, width, load.keys + width)
        heads = group * self._kv_heads
        q = torch.randn(load.rows * width, heads, dim, device=device()).to(dtype())
        scale = dim**-0.5
        parts = decode.key_parts(load.rows * self._kv_heads, rows.max_context)
        assert (parts > 1) == bool(split)

        def runs(way: Way) -> list[Run]:
            keys, warps, stages = Blocks._make(way)
            config = (int(keys), parts, int(warps), int(stages))
            return [lambda: decode.attend_decode(q, cache, table, rows, scale, 0, config)]

        def problem(_: int) -> Problem:
            one = DecodeRows(slots[:1], starts[:1], width, rows.max_context)
            reference = _reference(q[:width], cache, table, one, scale)
            return Problem(runs, reference, ERROR)

        return problem

    def _cache(
        self, load: Load, width: int, dim: int, dtype: torch.dtype
    ) -> tuple[KVCache, torch.Tensor]:
        """Pages of random numbers, and the table of the rows' pages; slot 0 has the null page."""
        pages = -(-(load.keys + width) // self._page)
        shape = (load.rows * pages + 1, self._page, self._kv_heads, dim)
        keys, values = (torch.randn(shape, device=device()).to(dtype) for _ in range(2))
        table = torch.arange(1, load.rows * pages + 1, device=device()).view(load.rows, pages)
        null = torch.zeros(1, pages, dtype=table.dtype, device=device())
        return KVCache(keys, values), torch.cat([null, table]).int()


_reference: Callable[..., torch.Tensor] = inspect.unwrap(attend_decode)


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
