"""GDN decode: rows that read their state once and write a window row for each token."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernel_cases.case import Case, relative
from kernel_cases.gdn_inputs import gdn_cache, gdn_inputs, gdn_truth
from kernel_cases.shapes import DEVICE, FULL, SEQUENCES, WINDOW
from millrace.kernels.batch import DecodeRows, GDNState
from millrace.kernels.gpu import gdn_decode as gpu_gdn


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
        state = rows * FULL.values * FULL.dim * size
        row = rows * (FULL.keys + FULL.value_heads * (FULL.dim + 1)) * 4
        short = "fp32" if dtype == torch.float32 else "bf16"
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
