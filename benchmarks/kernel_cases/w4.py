"""Products of the model's shapes with weights of 4 bits, groups of 128: every way to make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernel_cases.case import Case, relative
from kernel_cases.gemm import GEMM_SHAPES
from kernel_cases.shapes import DEVICE
from millrace.kernels.gemm import W4, dequantize_w4
from millrace.kernels.gpu.gemm import w4
from millrace.kernels.gpu.gemm.w4_few import Form, w4_few

GROUP = 128
# warps, tiles of 16 rows, groups of a run, blocks of a multiprocessor
FORMS = [
    Form(8, 1, 1, 3), Form(8, 2, 1, 2), Form(8, 2, 1, 3), Form(4, 2, 1, 5), Form(4, 1, 1, 6),
    Form(8, 1, 2, 2), Form(16, 1, 1, 1),
]  # fmt: skip
# tokens, outputs, inputs of a tile, swap, splits, warps, stages
MIDDLE = [
    (0, 64, 128, True, 0, 4, 4), (0, 64, 64, True, 0, 4, 4), (0, 128, 64, True, 0, 4, 4),
    (0, 64, 128, True, 0, 4, 2), (0, 64, 128, False, 0, 4, 3),
]  # fmt: skip
LARGE = [
    (128, 128, 64, True, 1, 8, 3), (256, 128, 64, True, 1, 8, 3), (128, 128, 64, False, 1, 8, 3),
    (128, 128, 32, True, 1, 4, 4), (256, 64, 64, True, 1, 8, 3), (128, 256, 64, False, 1, 8, 3),
]  # fmt: skip


def random_weight(out: int, width: int) -> W4:
    codes = torch.randint(-(2**31), 2**31, (out, width // 8), device=DEVICE, dtype=torch.int64)
    scales = (torch.rand(out, width // GROUP, device=DEVICE) * 1e-2 + 1e-3).half()
    factor = torch.ones(out, 1, device=DEVICE)
    return W4(codes.to(torch.int32), scales, factor, None, GROUP)


def check(run: Callable[..., Tensor | None], tokens: int, out: int, width: int) -> float:
    """Against the product in float64, for up to 64 tokens."""
    weight = random_weight(out, width)
    x = torch.randn(tokens, width, device=DEVICE).bfloat16()
    rows = torch.arange(0, tokens, max(1, tokens // 64), device=DEVICE)
    found = run(x, weight)
    if found is None:
        return float("inf")
    return relative(found[rows], x[rows].double() @ dequantize_w4(weight).double().t())


def case(name: str, tokens: int, way: str, run: Callable[..., Tensor | None], calls: int) -> Case:
    """A product of GEMM_SHAPES, of so many calls to a graph."""
    out, width = GEMM_SHAPES[name]

    def made() -> list[Callable[[], object]]:
        copies = [random_weight(out, width) for _ in range(3 if out > 6000 else 6)]
        x = torch.randn(tokens, width, device=DEVICE).bfloat16()
        return [lambda w=w: run(x, w) for w in copies] * max(1, calls // len(copies))

    moved = out * width / 2 + 2 * out * width / GROUP + 2 * tokens * (width + out)
    return Case(
        f"{name} M={tokens} {way}", lambda: check(run, tokens, out, width), 5e-3, made, moved,
        2.0 * tokens * out * width, "bf16",
    )  # fmt: skip


def by_tiles(tokens: int, name: str, tiles: tuple[int, ...]) -> Callable[..., Tensor]:
    """The Triton kernel; 0 of tokens: as many as there are, of splits: as chosen otherwise."""
    chosen = w4.tile_rule(tokens, *GEMM_SHAPES[name])
    size = tiles[0] or max(16, tokens)
    full = w4.Tiles(size, *tiles[1:4], tiles[4] or chosen.splits, *tiles[5:])  # type: ignore[misc]
    return lambda x, weight: w4.triton_matmul(x, weight, full)


def by_cublas(x: Tensor, weight: W4) -> Tensor:
    return torch.nn.functional.linear(x, w4.dequantized(weight, x.dtype))


def cases(quick: bool) -> Iterator[Case]:
    """Few tokens: floors and 2.5 us are some 12 us for qkv_gate, 7 for attn_o, 24 for gate_up, 14
    for down, 13 for gdn_qkvz. quick: the first form or tiles of each, and cuBLAS."""
    for name in GEMM_SHAPES:
        for tokens in (2, 8) if quick else (1, 2, 4, 8):
            for form in FORMS[:2] if quick else FORMS:
                way = f"few{tuple(form)}"
                yield case(name, tokens, way, lambda x, w, f=form: w4_few(x, w, f), 12)
        for tokens in (2, 16, 64):
            for tiles in MIDDLE[:1] if quick else MIDDLE:
                yield case(name, tokens, f"triton{tiles}", by_tiles(tokens, name, tiles), 12)
        for tokens in (256, 512, 1024, 4096, 16384):
            for tiles in LARGE[:1] if quick else LARGE:
                if tokens <= 512 or tiles == LARGE[0]:
                    yield case(name, tokens, f"triton{tiles}", by_tiles(tokens, name, tiles), 1)
            yield case(name, tokens, "cublas, dequantized", by_cublas, 1)
