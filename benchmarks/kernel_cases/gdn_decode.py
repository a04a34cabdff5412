"""GDN decode: rows that read their state once and write a window row for each token.

`cases` are its two kernels after the convolution, `step_cases` all of a layer between its products,
with the convolution as a kernel of its own and as part of the first of the two.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernel_cases.case import Case, relative
from kernel_cases.gdn_inputs import gdn_cache, gdn_inputs, gdn_truth
from kernel_cases.shapes import DEVICE, FULL, SEQUENCES, WINDOW
from millrace.kernels.batch import DecodeRows, GDNState
from millrace.kernels.gpu import gdn as gpu
from millrace.kernels.gpu.gdn import decode as gpu_gdn

STATES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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


def cases(quick: bool) -> Iterator[Case]:
    rows = SEQUENCES
    configs = [None, (32, 1)]
    for dtype in STATES:
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
        state = rows * FULL.values * FULL.dim * size
        row = rows * (FULL.keys + FULL.value_heads * (FULL.dim + 1)) * 4
        short = STATES[dtype]
        for config in configs:
            for filled in (7, -1):
                share = 1 / 7 if filled < 0 else 0
                io = 2 * rows * FULL.projected * 2
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


# --- with the convolution ----------------------------------------------------------------------

FEW = (1, 8, 32, SEQUENCES)


class Step:
    """A decode step of one layer, over slots in any order; every seventh row folds."""

    def __init__(self, rows: int, n: int, state: torch.dtype) -> None:
        self.cache, slots = gdn_cache(rows + 1, n, state), torch.randperm(rows, device=DEVICE) + 1
        self.cache.window_k = self.cache.window_k.bfloat16()
        self.fill = torch.full((rows + 1,), 7, device=DEVICE, dtype=torch.int32)
        self.fill[::7] = WINDOW - 1
        self.rows = DecodeRows(slots, torch.zeros_like(slots), n, 1)
        self.offset = torch.randint(0, n, (rows + 1,), device=DEVICE).int()
        wide = torch.randn(rows * n, FULL.projected, device=DEVICE).bfloat16()
        self.x, gates = wide[:, : FULL.channels], torch.randn(rows * n, 2 * FULL.value_heads)
        self.a, self.b = gates.to(DEVICE).bfloat16().chunk(2, -1)
        self.gating = torch.rand(2, FULL.value_heads, device=DEVICE).unbind()
        self.weight = torch.randn(FULL.channels, 4, device=DEVICE).bfloat16()

    def fused(self) -> Tensor:
        return gpu.gdn_decode_conv(
            self.x, self.weight, self.a, self.b, *self.gating, self.cache, self.fill, self.offset,
            self.rows,
        )  # fmt: skip

    def convolved(self) -> Tensor:
        return gpu.conv_decode(self.x, self.cache, self.weight, self.rows, self.offset)

    def apart(self) -> Tensor:
        return gpu.gdn_decode_raw(
            self.convolved(), self.a, self.b, *self.gating, self.cache, self.fill, self.rows
        )

    def first_half(self, fused: bool) -> object:
        """Everything before the pass over the state."""
        x = self.x if fused else self.convolved()
        conv = (self.weight, self.offset) if fused else None
        weight = self.weight if fused else None
        form = gpu_gdn.native(x, self.a, True, self.cache, self.rows.width, weight)
        if form is None:
            raise RuntimeError("the CUDA form does not apply")
        form = form._replace(answer=lambda **_: None, many=None)
        gates = (self.a, self.b, *self.gating)
        return gpu_gdn.launch_native(form, x, gates, self.cache, self.fill, self.rows, conv)


@functools.cache
def check_step(n: int, state: torch.dtype) -> float:
    """Error of outputs and folded states against float64 from the convolved tokens on; infinite
    where fusing changes a bit of anything."""
    step = Step(33, n, state)
    twin = copy.deepcopy(step)
    qkv, before = copy.deepcopy(step).convolved(), copy.deepcopy(step.cache)
    got, want = step.fused(), twin.apart()
    names = ("state", "conv", "window_k", "window_u", "window_g")
    pairs = [(getattr(step.cache, name), getattr(twin.cache, name)) for name in names]
    if not all(torch.equal(a, b) for a, b in [(got, want), *pairs]):
        return float("inf")
    g, beta = gpu.gates(step.a, step.b, *step.gating)
    errors = []
    for row, slot in enumerate(step.rows.slots.tolist()):
        tokens = slice(row * n, row * n + n)
        o, _, folded, _ = gdn_truth(before, step.fill, slot, qkv[tokens], g[tokens], beta[tokens])
        errors.append(relative(got[tokens], o))
        if int(step.fill[slot]) + n > WINDOW:
            errors.append(relative(step.cache.state[slot], folded))
    return max(errors)


def step_cases(quick: bool) -> Iterator[Case]:
    for state in (torch.float32,) if quick else STATES:
        name, size, n = STATES[state], state.itemsize, 2
        ways: dict[str, Callable[[Step], object]] = {
            "first half, fused": lambda step: step.first_half(True),
            "first half, apart": lambda step: step.first_half(False),
            "all, fused": Step.fused,
            "all, apart": Step.apart,
        }
        held = 7 + 8 / 7  # rows of a window on average: one in seven has 15 and folds
        first = 2 * FULL.channels * (n + 3 + n + 2 + n)  # inputs, kept ones, new ones, convolved
        first += (held + n) * FULL.keys * 2 + 4 * FULL.value_heads * 95 + held / 7 * FULL.keys * 4
        rest = FULL.values * FULL.dim * size * 8 / 7 + (held + n) * FULL.values * 4
        rest += 4 * n * FULL.values + 2 * n * FULL.channels + 4 * FULL.value_heads * 95
        for rows in FEW:
            for way, run in ways.items():

                def calls(rows=rows, run=run, state=state, n=n):
                    steps = [Step(rows, n, state) for _ in range(max(2, SEQUENCES // rows))]
                    return [lambda step=step: run(step) for step in steps]

                moved = rows * (first + (rest if way.startswith("all") else 0))
                yield Case(
                    f"{name} n={n} {rows} rows: {way}",
                    lambda state=state, n=n: check_step(n, state), 5e-3, calls, moved,
                )  # fmt: skip
    torch.cuda.empty_cache()


# --- when states are asked for -----------------------------------------------------------------


def block_cases(quick: bool) -> Iterator[Case]:
    """All of a layer's decode with float32 states that are asked for at once, while the first
    kernel runs ("ahead"), or one after the other; and with narrow ones, always ahead.

    Measured in us, 256 and 32 rows: 310.8 and 45.3 ahead, 304.0 and 48.2 else; float16 with 5
    blocks a multiprocessor 205.9 and 35.2 (4: 213.0, 34.9; later: 213.4, 36.8; 6: 247.5, 43.6).
    """
    n, held, most = 2, 7 + 8 / 7, gpu_gdn.MOST_ROWS_AHEAD
    for state in STATES:
        one = FULL.values * FULL.dim * state.itemsize * 8 / 7 + (held + n) * FULL.values * 4
        one += (held + n) * FULL.keys * 2 + 4 * n * FULL.values + 12 * n * FULL.channels
        for ahead in (True, False) if state == torch.float32 else (True,):
            for rows in (SEQUENCES, 32):

                def calls(ahead=ahead, rows=rows, state=state, n=n):
                    gpu_gdn.MOST_ROWS_AHEAD = SEQUENCES if ahead else 0
                    steps = [Step(rows, n, state) for _ in range(max(2, SEQUENCES // rows))]
                    return [step.fused for step in steps]

                name = f"{STATES[state]} {rows} rows{', ahead' * ahead}"
                check = functools.partial(check_step, n, state)
                yield Case(name, check, 5e-3, calls, rows * one)
    gpu_gdn.MOST_ROWS_AHEAD = most
