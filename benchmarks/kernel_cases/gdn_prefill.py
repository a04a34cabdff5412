"""GDN prefill: prompts in chunks, from an empty window to a folded state."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernel_cases.case import Case, relative
from kernel_cases.gdn_inputs import gdn_cache, gdn_inputs, gdn_truth, prefill_rows
from kernel_cases.shapes import FULL, Sizes
from millrace.kernels.gpu.gdn import prefill as gpu_prefill


def check(run: Callable[..., Tensor], sizes: Sizes = FULL) -> float:
    """o and the final state against float64, token by token, for lengths at chunk edges."""
    counts = (1, 64, 65, 130, 15)
    rows = prefill_rows(counts)
    cache = gdn_cache(7, 2, torch.float32, sizes)
    empty = torch.zeros(7, dtype=torch.int32)
    qkv, g, beta = gdn_inputs(sum(counts), sizes)
    qkv[:, sizes.keys : 2 * sizes.keys] += 0.5  # keys that resemble each other
    truth = []
    pieces = [x.split(list(counts)) for x in (qkv.float(), g, beta)]
    for row, slot in enumerate(rows.slots.tolist()):
        truth.append(gdn_truth(cache, empty, slot, *(x[row] for x in pieces), sizes))
    error = relative(run(qkv, g, beta, cache, rows), torch.cat([found[0] for found in truth]))
    return max(error, relative(cache.state[rows.slots], torch.stack([x[3] for x in truth])))


# (warps of the solve, value tile, warps and stages of the walk)
PREFILLS = ((1, 64, 4, 2), (1, 64, 4, 1), (1, 64, 4, 3), (1, 128, 8, 2), (1, 128, 8, 1),
            (1, 64, 8, 2), (1, 32, 4, 2), (1, 32, 2, 3), (1, 32, 2, 2))  # fmt: skip


def cases(quick: bool) -> Iterator[Case]:
    ways: dict[str, Callable[..., Tensor]] = {
        str(config): lambda *x, c=config: gpu_prefill.gdn_prefill(*x, c)
        for config in PREFILLS[: 1 if quick else None]
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
                f"{len(counts)}x{counts[0]} {name}", lambda run=run: check(run), 1e-2,
                calls, tokens * FULL.projected * 2.0, tokens * 0.42e9 / 48,
            )  # fmt: skip
