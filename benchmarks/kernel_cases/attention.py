"""Attention over FP8 and bfloat16 pages: decoding rows, and prompts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernel_cases.case import Case, relative
from kernel_cases.gdn_inputs import prefill_rows
from kernel_cases.shapes import DEVICE, HEAD_DIM, HEADS, KV_HEADS, PAGE
from millrace.kernels import attention
from millrace.kernels.batch import DecodeRows, KVCache
from millrace.kernels.gpu import attention as gpu_attention
from millrace.kernels.gpu.attention import hopper, prefill


def kv_cache(rows: int, longest: int, dtype: torch.dtype) -> tuple[KVCache, Tensor]:
    pages = -(-longest // PAGE)
    shape = (rows * pages + 1, PAGE, KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    table = torch.randperm(rows * pages, device=DEVICE).view(rows, pages) + 1
    null = torch.zeros(1, pages, dtype=table.dtype, device=DEVICE)
    return KVCache(keys, values), torch.cat([null, table]).int()


def check_attention(n: int, dtype: torch.dtype, config: tuple[int, ...] | None) -> float:
    """Against float64 at lengths around page edges; what lies past a row's end is NaN."""
    starts = torch.tensor([0, PAGE - n, PAGE, 3 * PAGE + 1, 700, 1023, 0], device=DEVICE)
    slots = torch.tensor([3, 1, 6, 2, 5, 4, 0], device=DEVICE)
    cache, table = kv_cache(6, 1100, dtype)
    for slot, start in zip(slots.tolist()[:-1], starts.tolist()[:-1], strict=True):
        for place in range(start + n, table.shape[1] * PAGE):
            for x in (cache.keys, cache.values):
                x.view(torch.uint8)[table[slot, place // PAGE], place % PAGE] = 0x7F
    q = torch.randn(len(slots) * n, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
    rows = DecodeRows(slots, starts, n, 1024 + n)
    wide = KVCache(cache.keys.double(), cache.values.double())
    truth = attention.attend_decode.__wrapped__(q.double(), wide, table, rows, 1 / 16)
    got = gpu_attention.attend_decode(q, cache, table, rows, 1 / 16, 0, config)
    return relative(got[:-n], truth[:-n])


def decode_case(
    rows: int, length: int, dtype: torch.dtype, config: tuple[int, int, int, int] | None
) -> Case:
    """Rows of two tokens each, around `length` keys."""

    def calls():
        cache, table = kv_cache(rows, length + 520, dtype)
        spread = min(length // 2, 400) if rows > 1 else 0
        starts = length + torch.randint(-spread, spread + 1, (rows,), device=DEVICE)
        slots = torch.arange(1, rows + 1, device=DEVICE)
        decode = DecodeRows(slots, starts, 2, length + spread + 2)
        q = torch.randn(rows * 2, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
        return [lambda: gpu_attention.attend_decode(q, cache, table, decode, 1 / 16, 0, config)] * 3

    size = torch.finfo(dtype).bits // 8
    return Case(
        f"decode {rows}x{length} {str(dtype)[6:]} {config}",
        lambda: check_attention(2, dtype, config), 4e-3, calls,
        2.0 * rows * length * KV_HEADS * HEAD_DIM * size + 4.0 * rows * HEADS * HEAD_DIM * 2,
        4.0 * rows * length * 2 * HEADS * HEAD_DIM,
    )  # fmt: skip


def few_rows_cases(quick: bool) -> Iterator[Case]:
    """In how many parts the keys of few rows are cut. None: as the engine does it."""
    for rows in (8, 32, 64, 128):
        parts = [n for n in (1, 2, 4, 8, 16) if 128 <= rows * KV_HEADS * n <= 1024]
        configs = [(32, n, 2, 5) for n in parts] + [(64, n, 4, 3) for n in parts if n > 1]
        for config in [None, *(configs[:3] if quick else configs)]:
            yield decode_case(rows, 960, torch.float8_e4m3fn, config)


def cases(quick: bool) -> Iterator[Case]:
    for rows, length in ((256, 960), (448, 960), (8, 960), (1, 1100), (1, 32768), (32, 960)):
        configs = [(64, 1, 4, 2), (64, 1, 4, 3), (64, 2, 4, 3), (64, 4, 4, 3), (32, 2, 4, 4),
                   (128, 1, 8, 2), (128, 2, 8, 2), (64, 2, 8, 3)]  # fmt: skip
        if quick:
            configs = configs[1:4]
        for config in configs if rows == 256 else [None, (64, 32, 4, 3)] if rows < 32 else [None]:
            for dtype in (
                (torch.float8_e4m3fn, torch.bfloat16) if rows == 256 else (torch.float8_e4m3fn,)
            ):
                yield decode_case(rows, length, dtype, config)
    for config in [(128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (128, 32, 8, 3)]:

        def calls(config=config):
            cache, table = kv_cache(8, 1024, torch.float8_e4m3fn)
            rows = prefill_rows((1024,) * 8)
            q = torch.randn(8 * 1024, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
            return [
                lambda: gpu_attention.attend_prefill(q, cache, table, rows, 1 / 16, 0, config)
            ] * 3

        yield Case(
            f"prefill 8x1024 e4m3 {config}", lambda c=config: check_prefill_attention(c), 4e-3,
            calls, 8 * 1024 * HEAD_DIM * (4 * HEADS + 2 * KV_HEADS),
            4 * 8 * HEADS * HEAD_DIM * 1024 * 1025 / 2,
        )  # fmt: skip


def check_prefill_attention(config: tuple[int, ...]) -> float:
    cache, table = kv_cache(4, 700, torch.float8_e4m3fn)
    rows = prefill_rows((1, 129, 300, 64), (0, 0, 333, 636))
    q = torch.randn(sum(rows.counts), HEADS, HEAD_DIM, device=DEVICE).bfloat16()
    got = gpu_attention.attend_prefill(q, cache, table, rows, 1 / 16, 0, config)
    wide = KVCache(cache.keys.double(), cache.values.double())
    truth = attention.attend_prefill.__wrapped__(q.double(), wide, table, rows, 1 / 16)
    return relative(got, truth)


PROMPTS = (  # tokens of each row, and of its context
    ((1024,) * 8, (0,) * 8), ((1024,), (15360,)), ((1024,), (31744,)), ((870,), (60000,)),
    ((512,), (60000,)), ((32768,), (0,)),
)  # fmt: skip


def prompt_cases(quick: bool) -> Iterator[Case]:
    """Prompts by boxes of what is widened, by Triton and by the kernel for Hopper. That comes
    last, as a fault of it ends the process's use of the GPU. Unless quick also by blocks from
    pages."""
    ways: list[tuple[str, tuple[int, ...] | None]] = [("triton", (128, 32, 8, 3))]
    if not quick:
        more = [(128, 64, 8, 2), (128, 32, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3)]
        ways += [("pages", (128, 64, 8, 2)), *(("triton", config) for config in more)]
    for way, config in [*ways, ("hopper", None)]:
        for counts, starts in PROMPTS:
            yield _prompt_case(way, config, counts, starts)
    prefill.BOXES, hopper.ON = True, False


def _prompt_case(
    way: str, config: tuple[int, ...] | None, counts: tuple[int, ...], starts: tuple[int, ...]
) -> Case:
    def choose() -> None:
        prefill.BOXES, hopper.ON = way != "pages", way == "hopper"
        if hopper.ON and hopper.kernel_for(torch.int64, torch.int32) is None:
            raise RuntimeError("there is no kernel for Hopper")

    def check() -> float:
        choose()
        error = check_prefill_attention(config)
        if way == "hopper":  # and, at the case's own lengths, what Triton's kernel finds
            attend = calls()[0]
            got = attend()
            hopper.ON = False
            error = max(error, relative(got, attend()))
            hopper.ON = True
        return error

    def calls():
        choose()
        cache, table = kv_cache(len(counts), max(starts) + max(counts), torch.float8_e4m3fn)
        rows = prefill_rows(counts, starts)
        q = torch.randn(sum(counts), HEADS, HEAD_DIM, device=DEVICE).bfloat16()
        given = (q, cache, table, rows, 1 / 16, 0, config)
        return [lambda: gpu_attention.attend_prefill(*given)] * 3

    keys = sum(counts) + sum(starts)
    pairs = sum(c * s + c * (c + 1) / 2 for c, s in zip(counts, starts, strict=True))
    name = f"prefill {len(counts)}x{counts[0]}+{starts[0]} {way} {config or ''}"
    moved = HEAD_DIM * (4 * HEADS * sum(counts) + 2 * KV_HEADS * keys)
    return Case(name, check, 4e-3, calls, moved, 4 * HEADS * HEAD_DIM * pairs)
