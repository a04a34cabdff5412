"""Check and time every GPU op at the shapes of the 27B model, floors beside figures.

    python benchmarks/kernels_h200.py [--only gdn_decode,gemm] [--out results.json] [--warm 12]
    TRITON_INTERPRET=1 python benchmarks/kernels_h200.py --dry-run   # a machine without a GPU

Every variant that is timed is first compared with a reference in float64 or float32 on fresh random
inputs. The floor is the larger of bytes / copy bandwidth and FLOPs / matrix rate; both ceilings are
measured by the same run, but FP8's, which is taken as 1,300 TFLOP/s. Times are medians over replays
of a CUDA graph whose calls together touch more memory than the L2 cache holds, so they hold neither
launch overhead nor cache hits.
--warm compiles in so many processes beforehand (Triton caches what it compiles). Sections run in
the order given, and what is found is merged into --out, so that several calls share the work. With
--warm 14 all of them take some five minutes on an H200; --quick leaves out the variants that have
lost before. --dry-run checks small float32 cases of the newer variants in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from millrace.kernels import attention, gdn, gemm, norm, sampling
from millrace.kernels.batch import DecodeRows, GDNState, KVCache, PrefillRows
from millrace.kernels.gpu import attention as gpu_attention
from millrace.kernels.gpu import conv as gpu_conv
from millrace.kernels.gpu import gdn_decode as gpu_gdn
from millrace.kernels.gpu import gdn_prefill as gpu_prefill
from millrace.kernels.gpu import gemm as gpu_gemm
from millrace.kernels.gpu import gemm_few
from millrace.kernels.gpu import quantize as gpu_quantize
from millrace.kernels.gpu import sampling as gpu_sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = False
SEQUENCES = 256
HIDDEN, INTER, VOCAB = 5120, 17408, 248320
KEY_HEADS, VALUE_HEADS, DIM, WINDOW = 16, 48, 128, 16
CHANNELS = 2 * KEY_HEADS * DIM + VALUE_HEADS * DIM
HEADS, KV_HEADS, HEAD_DIM, PAGE = 24, 4, 256, 64
GEMM_SHAPES = {
    "qkv_gate": (14336, 5120),
    "attn_o": (5120, 6144),
    "gate_up": (34816, 5120),
    "down": (5120, 17408),
    "gdn_qkvz": (16384, 5120),
}

T = TypeVar("T")


@dataclass
class Case:
    """One variant of one op. check: its error against the reference; calls: what is timed, each
    call moving `bytes` bytes and doing `flops` operations on the unit `rate`."""

    name: str
    check: Callable[[], float]
    limit: float
    calls: Callable[[], list[Callable[[], object]]]
    bytes: float
    flops: float = 0.0
    rate: str = "bf16"
    captured: bool = True  # False: the call copies from the host and is timed as it is


def relative(x: Tensor, y: Tensor) -> float:
    """||x - y|| / ||y||; infinite where one has a NaN and the other not."""
    x, y = x.double(), y.double()
    if bool((x.isnan() != y.isnan()).any()):
        return float("inf")
    x, y = x.nan_to_num(), y.nan_to_num()
    return ((x - y).norm() / y.norm().clamp(min=1e-30)).item()


def timed(calls: list[Callable[[], object]], captured: bool = True, replays: int = 7) -> float:
    """Median seconds of one call."""

    def play() -> None:
        for call in calls:
            call()

    play()
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            play()
        play = graph.replay
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        play()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and bf16 matrix rate of this device; FP8's rate."""
    source = torch.randn(1 << 30, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)])
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * 8192**3 / timed([lambda: a @ b] * 4)
    return {"bytes": copy, "bf16": bf16, "fp8": 1300e12}


# --- GDN decode --------------------------------------------------------------------------------


def gdn_cache(slots: int, n: int, state: torch.dtype) -> GDNState:
    """State and live windows of random values; keys normalised."""
    rand = torch.randn(slots, VALUE_HEADS, DIM, DIM, device=DEVICE, dtype=torch.float32)
    k = torch.randn(slots, KEY_HEADS, WINDOW, DIM, device=DEVICE)
    return GDNState(
        rand.mul_(0.1).to(state),
        torch.nn.functional.normalize(k, dim=-1),
        torch.randn(slots, VALUE_HEADS, WINDOW, DIM, device=DEVICE),
        -torch.rand(slots, VALUE_HEADS, WINDOW, device=DEVICE).mul_(0.1).cumsum(-1),
        torch.randn(slots, 2 + n, CHANNELS, device=DEVICE).bfloat16(),
    )


def gdn_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv = torch.randn(tokens, CHANNELS, device=DEVICE).bfloat16()
    g = -torch.rand(tokens, VALUE_HEADS, device=DEVICE) * 0.1
    return qkv, g, torch.rand(tokens, VALUE_HEADS, device=DEVICE)


def gdn_truth(cache: GDNState, fill: Tensor, slot: int, qkv: Tensor, g: Tensor, beta: Tensor):
    """One row token by token in float64: outputs, the new u, its state before the new tokens and
    behind them."""
    f = int(fill[slot])
    ratio = VALUE_HEADS // KEY_HEADS
    S = cache.state[slot].double()
    if f:
        k = cache.window_k[slot, :, :f].double().repeat_interleave(ratio, 0)
        log = cache.window_g[slot, :, :f].double()
        share = (log[:, -1:] - log).exp().unsqueeze(-1)
        S = S * log[:, -1].exp()[:, None, None]
        S = S + (k * share).transpose(1, 2) @ cache.window_u[slot, :, :f].double()
    folded, out, us = S, [], []
    for t in range(len(qkv)):
        qk, v = qkv[t].double().split([2 * KEY_HEADS * DIM, VALUE_HEADS * DIM])
        qk = qk.view(2, KEY_HEADS, DIM)
        qk = qk * (qk.square().sum(-1, keepdim=True) + gdn.L2_EPS).rsqrt()
        q, k = (x.repeat_interleave(ratio, 0) for x in (qk[0] * DIM**-0.5, qk[1]))
        S = S * g[t].double().exp()[:, None, None]
        u = v.view(VALUE_HEADS, DIM) - torch.einsum("hkv,hk->hv", S, k)
        us.append(u * beta[t].double()[:, None])
        S = S + k[:, :, None] * us[-1][:, None]
        out.append(torch.einsum("hkv,hk->hv", S, q))
    return torch.stack(out), torch.stack(us, 1), folded, S


def check_gdn(n: int, dtype: torch.dtype, config: tuple[int, int] | None) -> float:
    """Largest error of u and of the folded state against float64, over odd fills.

    Stale rows hold NaN. Outputs are bfloat16 and may only be off by its rounding.
    """
    rows, slots = 9, 12
    cache = gdn_cache(slots, n, dtype)
    fill = torch.randint(0, WINDOW + 1, (slots,), device=DEVICE, dtype=torch.int32)
    order = torch.tensor([5, 3, 11, 1, 0, 0, 8, 2, 7], device=DEVICE)
    fill[order[:4]] = torch.tensor([0, WINDOW, WINDOW - n, WINDOW - n + 1], device=DEVICE).int()
    for slot in range(slots):
        for x in (cache.window_k, cache.window_u, cache.window_g):
            x[slot, :, int(fill[slot]) :] = torch.nan
    cache.state[0] = torch.nan
    qkv, g, beta = gdn_inputs(rows * n)
    live = [r for r in range(rows) if order[r] != 0]
    truth = {
        r: gdn_truth(cache, fill, int(order[r]), *(x[r * n : r * n + n] for x in (qkv, g, beta)))
        for r in live
    }
    decode = DecodeRows(order, torch.zeros_like(order), n, 1)
    o = gpu_gdn.launch(qkv, g, beta, None, cache, fill, decode, config)
    errors = []
    for r in live:
        if relative(o[r * n : r * n + n], truth[r][0]) > 4e-3:
            return float("inf")
        slot = int(order[r])
        full = int(fill[slot]) + n > WINDOW
        if full:
            limit = 1.0 if dtype == torch.float32 else 1e-3
            errors.append(relative(cache.state[slot], truth[r][2]) * limit)
        place = 0 if full else int(fill[slot])
        total = g[r * n : r * n + n].double().sum(0)
        before = 0.0 if place == 0 else cache.window_g[slot, :, place - 1].double()
        errors.append(relative(cache.window_g[slot, :, place + n - 1], before + total))
        errors.append(relative(cache.window_u[slot, :, place : place + n], truth[r][1]))
    return max(errors)


def gdn_decode_cases() -> Iterator[Case]:
    rows = SEQUENCES
    configs = [None, (32, 1)]
    for dtype in (torch.float32, torch.bfloat16):
        cache: list[GDNState] = []

        def calls(
            n: int, filled: int, config: tuple[int, int] | None, rows=rows, dtype=dtype, cache=cache
        ):
            if not cache:
                cache.append(gdn_cache(SEQUENCES + 1, 6, dtype))
            fill = torch.full((SEQUENCES + 1,), filled, device=DEVICE, dtype=torch.int32)
            if filled < 0:  # every seventh row folds
                fill.fill_(7)[::7] = WINDOW - 1
            decode = DecodeRows(torch.randperm(rows, device=DEVICE) + 1, fill[:rows].long(), n, 1)
            qkv, g, beta = gdn_inputs(rows * n)
            return [lambda: gpu_gdn.launch(qkv, g, beta, None, cache[0], fill, decode, config)] * 3

        size = torch.finfo(dtype).bits // 8
        state = rows * VALUE_HEADS * DIM * DIM * size
        row = rows * (KEY_HEADS * DIM + VALUE_HEADS * (DIM + 1)) * 4
        short = "fp32" if dtype == torch.float32 else "bf16"
        for config in configs:
            for filled in (7, -1):
                share = 1 / 7 if filled < 0 else 0
                io = 2 * rows * (CHANNELS + VALUE_HEADS * DIM) * 2
                yield Case(
                    f"{short} n=2 fill={'mixed' if share else 7} {config}",
                    lambda c=config, d=dtype: check_gdn(2, d, c), 1e-4,
                    lambda c=config, f=filled, calls=calls: calls(2, f, c),
                    state * (1 + share) + row * 9 + io,
                )  # fmt: skip
        for few in (1, 8, 32):
            yield Case(
                f"{short} n=2 fill=7 {few} rows",
                lambda d=dtype: check_gdn(2, d, None), 1e-4,
                lambda f=few, calls=calls: calls(2, 7, None, f),
                (state + row * 9) / rows * few,
            )  # fmt: skip
        for n in (1, 3, 6):
            yield Case(
                f"{short} n={n} fill=mixed default",
                lambda n=n, d=dtype: check_gdn(n, d, None), 1e-4,
                lambda n=n, calls=calls: calls(n, 4 if n == 6 else -1, None),
                state * (1 + (1 / 7 if n < 6 else 0)) + row * (7 + n),
            )  # fmt: skip
    torch.cuda.empty_cache()


# --- GDN prefill -------------------------------------------------------------------------------


def prefill_rows(counts: tuple[int, ...], starts: tuple[int, ...] | None = None) -> PrefillRows:
    starts = starts or (0,) * len(counts)
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    slots = torch.randperm(len(counts), device=DEVICE) + 1
    return PrefillRows(slots, torch.tensor(starts, device=DEVICE), offsets, counts, starts)


def check_gdn_prefill(run: Callable[..., Tensor]) -> float:
    """o and the final state against float64, token by token, for lengths at chunk edges."""
    counts = (1, 64, 65, 130, 15)
    rows = prefill_rows(counts)
    cache = gdn_cache(7, 2, torch.float32)
    empty = torch.zeros(7, dtype=torch.int32)
    qkv, g, beta = gdn_inputs(sum(counts))
    qkv[:, KEY_HEADS * DIM : 2 * KEY_HEADS * DIM] += 0.5  # keys that resemble each other
    truth = []
    pieces = [x.split(list(counts)) for x in (qkv.float(), g, beta)]
    for row, slot in enumerate(rows.slots.tolist()):
        truth.append(gdn_truth(cache, empty, slot, *(x[row] for x in pieces)))
    error = relative(run(qkv, g, beta, cache, rows), torch.cat([found[0] for found in truth]))
    return max(error, relative(cache.state[rows.slots], torch.stack([x[3] for x in truth])))


# (warps of the solve, value tile, warps and stages of the walk)
PREFILLS = ((1, 64, 4, 2), (1, 64, 4, 1), (1, 64, 4, 3), (1, 128, 8, 2), (1, 128, 8, 1),
            (1, 64, 8, 2), (1, 32, 4, 2), (1, 32, 2, 3), (1, 32, 2, 2))  # fmt: skip


def gdn_prefill_cases() -> Iterator[Case]:
    ways: dict[str, Callable[..., Tensor]] = {
        str(config): lambda *x, c=config: gpu_prefill.gdn_prefill(*x, c)
        for config in PREFILLS[: 1 if QUICK else None]
    }
    for counts in ((1024,), (1024,) * 8, (16384,)):
        tokens = sum(counts)
        for name, run in ways.items():

            def calls(run=run, counts=counts, tokens=tokens):
                rows = prefill_rows(counts)
                cache = gdn_cache(len(counts) + 1, 2, torch.float32)
                inputs = gdn_inputs(tokens)
                return [lambda: run(*inputs, cache, rows)] * 2

            yield Case(
                f"{len(counts)}x{counts[0]} {name}", lambda run=run: check_gdn_prefill(run), 1e-2,
                calls, tokens * (CHANNELS + VALUE_HEADS * DIM) * 2.0, tokens * 0.42e9 / 48,
            )  # fmt: skip


# --- FP8 products ------------------------------------------------------------------------------


def fp8_weight(out: int, width: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(out, width, device=DEVICE).mul_(64).to(torch.float8_e4m3fn)
    return weight, torch.rand(-(-out // 128), -(-width // 128), device=DEVICE) * 1e-3 + 1e-4


def check_gemm(run: Callable[..., Tensor], tokens: int, out: int, width: int) -> float:
    """Against the exact product of the rounded inputs, in float64 for up to 64 tokens."""
    weight, scale = fp8_weight(out, width)
    x = torch.randn(tokens, width, device=DEVICE).bfloat16()
    q = gpu_quantize.quantize(x)
    rounded = q.values.float() * q.scales.repeat_interleave(128, 1)
    if relative(rounded, x) > 0.04:
        return float("inf")
    rows = torch.arange(0, tokens, max(1, tokens // 64), device=DEVICE)
    truth = rounded[rows].double() @ gemm.dequantize(weight, scale).double().t()
    return relative(run(q, weight, scale)[rows], truth)


def product_case(
    name: str, tokens: int, way: str, run: Callable[..., Tensor | None], calls: int = 0
) -> Case:
    """A product of GEMM_SHAPES. calls: to a graph; 0: one for each copy of the weight, of which
    there are enough to fall out of the L2 cache."""
    out, width = GEMM_SHAPES[name]

    def made() -> list[Callable[[], object]]:
        copies = [fp8_weight(out, width) for _ in range(2 if out > 6000 else 4)]
        q = gpu_quantize.quantize(torch.randn(tokens, width, device=DEVICE).bfloat16())
        return [lambda w=w: run(q, *w) for w in copies] * max(1, calls // len(copies))

    return Case(
        f"{name} M={tokens} {way}", lambda: check_gemm(run, tokens, out, width), 3e-3, made,
        out * width + tokens * (width + 2 * out), 2.0 * tokens * out * width, "fp8",
    )  # fmt: skip


def gemm_cases() -> Iterator[Case]:
    ways: dict[str, Callable[..., Tensor]] = {}
    if gpu_gemm._deep_gemm() is not None:
        ways["deepgemm"] = gpu_gemm.deep_gemm_matmul
    if not (QUICK and ways):
        ways["cublas"] = gpu_gemm.cublas_matmul
    small = [(0, 64, True, 4, 6)]
    large = [(64, 128, False, 4, 4), (64, 128, False, 4, 3), (128, 128, False, 8, 3)]
    for tokens in (64, 512, 1536, 8192) if QUICK else (2, 16, 64, 256, 512, 896, 1536, 8192):
        named = dict(ways)
        for config in small if tokens <= 64 else large:
            full = (max(16, tokens), *config[1:]) if tokens <= 64 else config

            def run(q, w, s, full=full):
                return gpu_gemm.triton_matmul(q, w, s, torch.bfloat16, full)

            if not QUICK and (tokens < 8192 or config == large[2]):
                named[f"triton{config[1:] if tokens <= 64 else config}"] = run
        for name in GEMM_SHAPES:
            for way, run in named.items():
                if tokens not in (896, 1536) or way in ("deepgemm", "cublas"):
                    yield product_case(name, tokens, way, run)


def gemm_few_cases() -> Iterator[Case]:
    """At most 8 tokens, a dozen calls to a graph. Our kernel should take its floor and 2.5 us: some
    20 us for qkv_gate, 10 for attn_o, 45 for gate_up, 24 for down, 22 for gdn_qkvz."""
    ways: dict[str, Callable[..., Tensor | None]] = {"few": gemm_few.few_matmul}
    if gpu_gemm._deep_gemm() is not None:
        ways["deepgemm"] = gpu_gemm.deep_gemm_matmul
    if not (QUICK and len(ways) > 1):
        ways["cublas"] = gpu_gemm.cublas_matmul
    for tokens in (1, 2, 4, 8):
        for name in GEMM_SHAPES:
            for way, run in ways.items():
                yield product_case(name, tokens, way, run, calls=12)


# --- attention ---------------------------------------------------------------------------------


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


def attention_cases() -> Iterator[Case]:
    for rows, length in ((256, 960), (448, 960), (8, 960), (1, 1100), (1, 32768), (32, 960)):
        configs = [(64, 1, 4, 2), (64, 1, 4, 3), (64, 2, 4, 3), (64, 4, 4, 3), (32, 2, 4, 4),
                   (128, 1, 8, 2), (128, 2, 8, 2), (64, 2, 8, 3)]  # fmt: skip
        if QUICK:
            configs = configs[1:4]
        for config in configs if rows == 256 else [None, (64, 32, 4, 3)] if rows < 32 else [None]:
            for dtype in (
                (torch.float8_e4m3fn, torch.bfloat16) if rows == 256 else (torch.float8_e4m3fn,)
            ):

                def calls(rows=rows, length=length, config=config, dtype=dtype):
                    cache, table = kv_cache(rows, length + 520, dtype)
                    spread = min(length // 2, 400) if rows > 1 else 0
                    starts = length + torch.randint(-spread, spread + 1, (rows,), device=DEVICE)
                    slots = torch.arange(1, rows + 1, device=DEVICE)
                    decode = DecodeRows(slots, starts, 2, length + spread + 2)
                    q = torch.randn(rows * 2, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
                    return [
                        lambda: gpu_attention.attend_decode(
                            q, cache, table, decode, 1 / 16, 0, config
                        )
                    ] * 3

                size = torch.finfo(dtype).bits // 8
                yield Case(
                    f"decode {rows}x{length} {str(dtype)[6:]} {config}",
                    lambda c=config, d=dtype: check_attention(2, d, c), 4e-3, calls,
                    2.0 * rows * length * KV_HEADS * HEAD_DIM * size
                    + 4.0 * rows * HEADS * HEAD_DIM * 2,
                    4.0 * rows * length * 2 * HEADS * HEAD_DIM,
                )  # fmt: skip
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


# --- fused small ops ---------------------------------------------------------------------------


def dequantized(q: gpu_quantize.Quantized) -> Tensor:
    return q.values.float() * q.scales.repeat_interleave(128, 1)[:, : q.values.shape[1]]


def chosen(module: object, name: str, value: object, run: Callable[[], T]) -> Callable[[], T]:
    """`run`, and the calls that it returns, with a module's choice set so."""

    def setting(*_: object) -> T:
        setattr(module, name, value)
        made = run()
        if isinstance(made, list):
            made = [chosen(module, name, value, call) for call in made]  # type: ignore[assignment]
        return made

    return setting


PROMPT_TILES = ((32, 128, 4), (16, 128, 4), (64, 128, 4), (16, 256, 4), (32, 256, 4), (8, 512, 4),
                (16, 512, 4), (64, 128, 8), (32, 256, 8), (64, 64, 4))  # fmt: skip


def prompt_cases(t: int = 8192) -> Iterator[Case]:
    """What stands around the products of a step of prompt tokens."""
    x, r = (torch.randn(t, HIDDEN, device=DEVICE).bfloat16() for _ in range(2))
    w = torch.randn(HIDDEN, device=DEVICE)
    wide = torch.randn(t, CHANNELS + VALUE_HEADS * DIM, device=DEVICE).bfloat16()[:, :CHANNELS]
    weight = torch.randn(CHANNELS, 4, device=DEVICE).bfloat16()
    counts = (1024,) * (t // 1024) or (t,)
    rows = prefill_rows(counts)
    offset = torch.zeros(len(counts) + 1, device=DEVICE).int()
    buffer = torch.randn(len(counts) + 1, 4, CHANNELS, device=DEVICE).bfloat16()
    cache = GDNState(*[x] * 4, buffer)

    def normed():
        return gpu_quantize.norm(x, r, w, 1e-6, keep=True, quantized=True)

    def check_norm() -> float:
        truth = norm.add_rms_norm.__wrapped__(x, r, w, 1e-6)
        got, _, total = normed()
        return max(relative(got, truth[0]), relative(total, truth[1]))

    def check_conv() -> float:
        own, twin = (GDNState(*[x] * 4, buffer.clone()) for _ in range(2))
        got = gpu_conv.conv_prefill(wide, own, weight, rows, offset)
        want = gdn.conv_prefill.__wrapped__(wide, twin, weight, rows, offset)
        return max(relative(got, want), relative(own.conv, twin.conv))

    yield Case(
        f"{t} tokens: add_rms_norm_quantize", check_norm, 4e-3, lambda: [normed] * 3, t * HIDDEN * 9
    )
    for tile in PROMPT_TILES[: 1 if QUICK else None]:
        yield Case(
            f"{t} tokens: conv_prefill {tile}",
            chosen(gpu_conv, "PROMPT_TILE", tile, check_conv), 5e-3,
            chosen(
                gpu_conv, "PROMPT_TILE", tile,
                lambda: [lambda: gpu_conv.conv_prefill(wide, cache, weight, rows, offset)] * 3,
            ), t * CHANNELS * 4,
        )  # fmt: skip
    gate_up = torch.randn(t, 2 * INTER, device=DEVICE).bfloat16()
    yield Case(
        f"{t} tokens: silu_mul_quantize", lambda: 0.0, 1.0,
        lambda: [lambda: gpu_quantize.silu_mul_quantize(gate_up)] * 3, t * INTER * 5,
    )  # fmt: skip


def fused_cases() -> Iterator[Case]:
    t = 512
    x, r = (torch.randn(t, HIDDEN, device=DEVICE).bfloat16() for _ in range(2))
    w = torch.randn(HIDDEN, device=DEVICE).bfloat16()
    gate_up = torch.randn(t, 2 * INTER, device=DEVICE).bfloat16()
    wide = torch.randn(t, CHANNELS + VALUE_HEADS * DIM, device=DEVICE).bfloat16()
    o = torch.randn(t, VALUE_HEADS, DIM, device=DEVICE).bfloat16()
    z = wide[:, CHANNELS:].unflatten(1, (VALUE_HEADS, DIM))
    dw = torch.randn(DIM, device=DEVICE).bfloat16()
    attn = torch.randn(t, HEADS * HEAD_DIM, device=DEVICE).bfloat16()
    up = gate_up.float()

    def both(op: Callable[[], gpu_quantize.Quantized], truth: Callable[[], Tensor]):
        return lambda: relative(dequantized(op()), truth())

    def norm_quantize(keep: bool):
        return lambda: gpu_quantize.norm(x, r, w, 1e-6, keep=keep, quantized=True)

    def check_norm() -> float:
        normed, q, total = norm_quantize(True)()
        truth = norm.add_rms_norm.__wrapped__(x.float(), r.float(), w, 1e-6)
        exact = max(relative(normed, truth[0]), relative(total, truth[1])) * 10
        return max(exact, relative(dequantized(q), truth[0]))

    for keep in (False, True):
        yield Case(
            f"add_rms_norm_quantize keep={keep}", check_norm, 0.04,
            lambda keep=keep: [norm_quantize(keep)] * 10, t * HIDDEN * (7 + 2 * keep),
        )  # fmt: skip
    yield from prompt_cases()
    table: dict[str, tuple[Callable[[], gpu_quantize.Quantized], Callable[[], Tensor], float]] = {
        "quantize": (lambda: gpu_quantize.quantize(x), lambda: x, t * HIDDEN * 3),
        "silu_mul_quantize": (
            lambda: gpu_quantize.silu_mul_quantize(gate_up),
            lambda: torch.nn.functional.silu(up[:, :INTER]) * up[:, INTER:],
            t * INTER * 5,
        ),
        "sigmoid_gate_quantize": (
            lambda: gpu_quantize.sigmoid_gate_quantize(attn, gate_up[:, : HEADS * HEAD_DIM]),
            lambda: attn.float() * up[:, : HEADS * HEAD_DIM].sigmoid(),
            t * HEADS * HEAD_DIM * 5,
        ),
        "gated_rms_norm_quantize": (
            lambda: gpu_quantize.gated_rms_norm_quantize(o, z, dw, 1e-6),
            lambda: norm.gated_rms_norm.__wrapped__(o.float(), z.float(), dw, 1e-6),
            t * VALUE_HEADS * DIM * 5,
        ),
    }
    for name, (op, truth, size) in table.items():
        yield Case(name, both(op, truth), 0.04, lambda op=op: [op] * 10, size)
    rows = 256
    cache = GDNState(*[x] * 4, torch.randn(rows + 1, 4, CHANNELS, device=DEVICE).bfloat16())
    decode = DecodeRows(torch.randperm(rows, device=DEVICE) + 1, torch.zeros(1), 2, 1)
    weight = torch.randn(CHANNELS, 4, device=DEVICE).bfloat16()
    offset = torch.randint(0, 2, (rows + 1,), device=DEVICE).int()

    def conv(op) -> tuple[Tensor, Tensor]:
        own = GDNState(*[x] * 4, cache.conv.clone())
        return op(wide[:, :CHANNELS], own, weight, decode, offset), own.conv

    def check_conv() -> float:
        pairs = zip(conv(gpu_conv.conv_decode), conv(gdn.conv_decode.__wrapped__), strict=True)
        return max(relative(a, b) for a, b in pairs)

    yield Case(
        "conv_decode", check_conv, 4e-3,
        lambda: [lambda: gpu_conv.conv_decode(wide[:, :CHANNELS], cache, weight, decode, offset)]
        * 10, rows * CHANNELS * 2 * (2 + 2 + 3 + 4),
    )  # fmt: skip


# --- sampling ----------------------------------------------------------------------------------


def sampling_cases() -> Iterator[Case]:
    def inputs(rows: int, **cut: float) -> dict[str, Tensor]:
        return {
            "temperature": torch.ones(rows, device=DEVICE),
            "top_p": torch.full((rows,), cut.get("top_p", 1.0), device=DEVICE),
            "top_k": torch.full((rows,), int(cut.get("top_k", 0)), device=DEVICE),
            "seed": torch.randint(-(2**62), 2**62, (rows,), device=DEVICE),
            "position": torch.arange(rows, device=DEVICE),
        }

    def check(**cut: float) -> float:
        """Share of tokens that differ from the reference; NaN never compares equal."""
        logits = torch.randn(64, VOCAB, device=DEVICE) * 3
        args = inputs(64, **cut)
        got = gpu_sampling.sample(logits, **args, filters=bool(cut))
        want = sampling.sample.__wrapped__(logits, **args, filters=bool(cut))
        return (got != want).float().mean().item()

    for rows, noise, cut, spread in (
        (512, False, {}, 1), (512, True, {}, 1), (2, True, {}, 1),
        (512, True, {"top_k": 50}, 1), (512, True, {"top_k": 20, "top_p": 0.95}, 1),
        (512, True, {"top_p": 0.9}, 1), (512, True, {"top_p": 0.9}, 6),
        (2, True, {"top_p": 0.9}, 6),
    ):  # fmt: skip

        def calls(rows=rows, noise=noise, cut=cut, spread=spread):
            logits = torch.randn(rows, VOCAB, device=DEVICE) * spread
            args = inputs(rows, **cut)
            return [lambda: gpu_sampling.sample(logits, **args, noise=noise, filters=bool(cut))] * 2

        name = f"{rows} rows noise={noise} {cut}" + f" spread {spread}" * (spread > 1)
        yield Case(
            name, lambda cut=cut: check(**cut), 0.02, calls, rows * VOCAB * 4.0,
        )  # fmt: skip


SECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "gdn_decode": gdn_decode_cases,
    "gdn_prefill": gdn_prefill_cases,
    "gemm": gemm_cases,
    "gemm_few": gemm_few_cases,
    "attention": attention_cases,
    "fused": fused_cases,
    "sampling": sampling_cases,
}


def warm(workers: int, only: str, quick: bool) -> None:
    """Compile every variant in parallel processes; failures show up in the real run."""
    command = [sys.executable, __file__, "--only", only, *(["--quick"] if quick else []), "--shard"]
    running = [
        subprocess.Popen(
            [*command, f"{i}/{workers}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for i in range(workers)
    ]
    for process in running:
        process.wait()


def compile_shard(shard: str, only: list[str]) -> None:
    mine, workers = (int(x) for x in shard.split("/"))
    index = 0
    for section in only:
        for case in SECTIONS[section]():
            index += 1
            if index % workers == mine:
                try:
                    case.check()
                except Exception as error:
                    print(section, case.name, error)


def measure(case: Case, ceiling: dict[str, float]) -> dict[str, object]:
    row: dict[str, object] = {"name": case.name}
    floor = max(case.bytes / ceiling["bytes"], case.flops / ceiling[case.rate])
    row["floor_us"] = floor * 1e6
    try:
        row["error"] = case.check()
        row["right"] = row["error"] <= case.limit
        seconds = timed(case.calls(), case.captured)
        row |= {"us": seconds * 1e6, "tb_s": case.bytes / seconds / 1e12}
        row["tflop_s"] = case.flops / seconds / 1e12
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        row["right"] = False
    torch.cuda.empty_cache()
    return row


def dry_run() -> int:
    """The newer variants at small sizes in Triton's interpreter; the exit status."""
    global KEY_HEADS, VALUE_HEADS, DIM, CHANNELS, HIDDEN, INTER
    KEY_HEADS, VALUE_HEADS, DIM, HIDDEN, INTER = 1, 2, 32, 1024, 256
    CHANNELS = 2 * KEY_HEADS * DIM + VALUE_HEADS * DIM
    wrong = 0
    error = check_gdn_prefill(lambda q, *x: gpu_prefill.gdn_prefill(q.float(), *x))
    print(f"gdn_prefill: error {error:.1e}")
    wrong += not error < 1e-4
    counts, width = (1, 40, 3, 64), CHANNELS
    rows, offset = prefill_rows(counts), torch.tensor([0, 1, 0, 1, 0]).int()
    x, weight = torch.randn(sum(counts), width + 8)[:, :width], torch.randn(width, 4)
    buffer = torch.randn(5, 4, width)
    own, twin = (GDNState(*[x] * 4, buffer.clone()) for _ in range(2))
    got = gpu_conv.conv_prefill(x, own, weight, rows, offset)
    want = gdn.conv_prefill.__wrapped__(x, twin, weight, rows, offset)
    error = max(relative(got, want), relative(own.conv, twin.conv))
    print(f"conv_prefill: error {error:.1e}")
    wrong += not error < 1e-5
    y, r, w = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN), torch.randn(HIDDEN)
    truth = norm.add_rms_norm.__wrapped__(y, r, w, 1e-6)[0]
    error = relative(gpu_quantize.norm(y, r, w, 1e-6)[0], truth)
    print(f"norm: error {error:.1e}")
    wrong += not error < 1e-5
    return int(wrong > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("kernels_h200.json"))
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="without variants known to lose")
    parser.add_argument("--dry-run", action="store_true", help="newer variants, interpreted")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    only = args.only.split(",")
    if unknown := [section for section in only if section not in SECTIONS]:
        parser.error(f"--only: no {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if args.dry_run:
        sys.exit(dry_run())
    global QUICK
    QUICK = args.quick
    if args.shard:
        compile_shard(args.shard, only)
        return
    if args.warm:
        warm(args.warm, args.only, args.quick)
    ceiling = ceilings()
    print({name: f"{value / 1e12:.2f}T" for name, value in ceiling.items()}, flush=True)
    results: dict[str, object] = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"device": torch.cuda.get_device_name(), "ceilings": ceiling}
    for section in only:
        rows = []
        for case in SECTIONS[section]():
            row = measure(case, ceiling)
            rows.append(row)
            figures = f"{row.get('us', 0):9.1f} us  floor {row['floor_us']:8.1f}"
            rates = f"{row.get('tb_s', 0):5.2f} TB/s {row.get('tflop_s', 0):7.1f} TF"
            state = row.get("failed") or f"err {row['error']:.1e}{'' if row['right'] else ' WRONG'}"
            print(f"{section:11s} {case.name:44s} {figures}  {rates}  {state}", flush=True)
            results[section] = rows
            args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
