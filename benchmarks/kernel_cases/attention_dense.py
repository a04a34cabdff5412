"""Attention of Qwen3 dense: heads of 128, groups of 4 (8B) and 8 (32B), over FP8 pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernel_cases.case import Case, relative
from kernel_cases.gdn_inputs import prefill_rows
from kernel_cases.shapes import DEVICE, PAGE
from millrace.kernels import attention
from millrace.kernels.batch import DecodeRows, KVCache
from millrace.kernels.gpu import attention as gpu_attention

KV_HEADS, DIM, SCALE = 8, 128, 128**-0.5
FP8 = torch.float8_e4m3fn
DECODE: list[tuple[int, int, int, int] | None] = [
    None, (32, 1, 2, 5), (64, 1, 4, 3), (64, 1, 2, 4), (64, 2, 4, 3), (128, 1, 4, 3),
]  # fmt: skip
PREFILL: list[tuple[int, int, int, int] | None] = [
    None, (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3),
]  # fmt: skip

Config = tuple[int, int, int, int] | None


def cache_of(rows: int, longest: int) -> tuple[KVCache, Tensor]:
    pages = -(-longest // PAGE)
    shape = (rows * pages + 1, PAGE, KV_HEADS, DIM)
    keys, values = (torch.randn(shape, device=DEVICE).to(FP8) for _ in range(2))
    table = torch.randperm(rows * pages, device=DEVICE).view(rows, pages) + 1
    null = torch.zeros(1, pages, dtype=table.dtype, device=DEVICE)
    return KVCache(keys, values), torch.cat([null, table]).int()


def queries(tokens: int, heads: int) -> Tensor:
    return torch.randn(tokens, heads, DIM, device=DEVICE).bfloat16()


def decode_rows(rows: int, length: int) -> DecodeRows:
    starts = length + torch.randint(-length // 3, length // 3, (rows,), device=DEVICE)
    slots = torch.arange(1, rows + 1, device=DEVICE)
    return DecodeRows(slots, starts, 1, length + length // 3 + 1)


def check_decode(heads: int, config: Config) -> float:
    cache, table = cache_of(5, 700)
    rows, q = decode_rows(5, 400), queries(5, heads)
    wide = KVCache(cache.keys.double(), cache.values.double())
    truth = attention.attend_decode.__wrapped__(q.double(), wide, table, rows, SCALE)
    return relative(gpu_attention.attend_decode(q, cache, table, rows, SCALE, 0, config), truth)


def check_prefill(heads: int, config: Config) -> float:
    cache, table = cache_of(4, 700)
    rows = prefill_rows((1, 129, 300, 64), (0, 0, 333, 636))
    q = queries(sum(rows.host_counts), heads)
    wide = KVCache(cache.keys.double(), cache.values.double())
    truth = attention.attend_prefill.__wrapped__(q.double(), wide, table, rows, SCALE)
    return relative(gpu_attention.attend_prefill(q, cache, table, rows, SCALE, 0, config), truth)


def decode_calls(heads: int, rows: int, length: int, config: Config) -> list[Callable[[], Tensor]]:
    cache, table = cache_of(rows, 2 * length)
    some, q = decode_rows(rows, length), queries(rows, heads)
    return [lambda: gpu_attention.attend_decode(q, cache, table, some, SCALE, 0, config)] * 3


def prefill_calls(heads: int, config: Config) -> list[Callable[[], Tensor]]:
    cache, table = cache_of(8, 1024)
    rows, q = prefill_rows((1024,) * 8), queries(8 * 1024, heads)
    return [lambda: gpu_attention.attend_prefill(q, cache, table, rows, SCALE, 0, config)] * 3


def cases(quick: bool) -> Iterator[Case]:
    for heads in (32, 64):
        for rows, length in ((256, 960), (32, 960), (1, 32768)):
            for config in DECODE if rows == 256 and not quick else [None]:
                yield Case(
                    f"decode {rows}x{length} {heads} heads {config}",
                    lambda h=heads, c=config: check_decode(h, c), 4e-3,
                    lambda h=heads, r=rows, n=length, c=config: decode_calls(h, r, n, c),
                    2.0 * rows * length * KV_HEADS * DIM + 4.0 * rows * heads * DIM,
                    4.0 * rows * length * heads * DIM,
                )  # fmt: skip
        for config in PREFILL[:1] if quick else PREFILL:
            yield Case(
                f"prefill 8x1024 {heads} heads {config}",
                lambda h=heads, c=config: check_prefill(h, c), 4e-3,
                lambda h=heads, c=config: prefill_calls(h, c),
                8 * 1024 * DIM * (4 * heads + 2 * KV_HEADS),
                4 * 8 * heads * DIM * 1024 * 1025 / 2,
            )  # fmt: skip
