"""The small ops around the products: norms, gates, quantizing, the short convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from kernel_cases.case import Case, relative
from kernel_cases.gdn_inputs import prefill_rows
from kernel_cases.shapes import DEVICE, FULL, HEAD_DIM, HEADS
from millrace.kernels import gdn, norm
from millrace.kernels.batch import DecodeRows, GDNState
from millrace.kernels.gpu import quantize as gpu_quantize
from millrace.kernels.gpu.gdn import conv as gpu_conv

T = TypeVar("T")


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


def prompt_cases(quick: bool, t: int = 8192) -> Iterator[Case]:
    """What stands around the products of a step of prompt tokens."""
    x, r = (torch.randn(t, FULL.hidden, device=DEVICE).bfloat16() for _ in range(2))
    w = torch.randn(FULL.hidden, device=DEVICE)
    wide = torch.randn(t, FULL.projected, device=DEVICE).bfloat16()[:, : FULL.channels]
    weight = torch.randn(FULL.channels, 4, device=DEVICE).bfloat16()
    counts = (1024,) * (t // 1024) or (t,)
    rows = prefill_rows(counts)
    offset = torch.zeros(len(counts) + 1, device=DEVICE).int()
    buffer = torch.randn(len(counts) + 1, 4, FULL.channels, device=DEVICE).bfloat16()
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
        f"{t} tokens: add_rms_norm_quantize",
        check_norm,
        4e-3,
        lambda: [normed] * 3,
        t * FULL.hidden * 9,
    )
    for tile in PROMPT_TILES[: 1 if quick else None]:
        yield Case(
            f"{t} tokens: conv_prefill {tile}",
            chosen(gpu_conv, "PROMPT_TILE", tile, check_conv), 5e-3,
            chosen(
                gpu_conv, "PROMPT_TILE", tile,
                lambda: [lambda: gpu_conv.conv_prefill(wide, cache, weight, rows, offset)] * 3,
            ), t * FULL.channels * 4,
        )  # fmt: skip
    gate_up = torch.randn(t, 2 * FULL.inter, device=DEVICE).bfloat16()
    yield Case(
        f"{t} tokens: silu_mul_quantize", lambda: 0.0, 1.0,
        lambda: [lambda: gpu_quantize.silu_mul_quantize(gate_up)] * 3, t * FULL.inter * 5,
    )  # fmt: skip


def cases(quick: bool) -> Iterator[Case]:
    t = 512
    x, r = (torch.randn(t, FULL.hidden, device=DEVICE).bfloat16() for _ in range(2))
    w = torch.randn(FULL.hidden, device=DEVICE).bfloat16()
    gate_up = torch.randn(t, 2 * FULL.inter, device=DEVICE).bfloat16()
    wide = torch.randn(t, FULL.projected, device=DEVICE).bfloat16()
    o = torch.randn(t, FULL.value_heads, FULL.dim, device=DEVICE).bfloat16()
    z = wide[:, FULL.channels :].unflatten(1, (FULL.value_heads, FULL.dim))
    dw = torch.randn(FULL.dim, device=DEVICE).bfloat16()
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
            lambda keep=keep: [norm_quantize(keep)] * 10, t * FULL.hidden * (7 + 2 * keep),
        )  # fmt: skip
    yield from prompt_cases(quick)
    table: dict[str, tuple[Callable[[], gpu_quantize.Quantized], Callable[[], Tensor], float]] = {
        "quantize": (lambda: gpu_quantize.quantize(x), lambda: x, t * FULL.hidden * 3),
        "silu_mul_quantize": (
            lambda: gpu_quantize.silu_mul_quantize(gate_up),
            lambda: torch.nn.functional.silu(up[:, : FULL.inter]) * up[:, FULL.inter :],
            t * FULL.inter * 5,
        ),
        "sigmoid_gate_quantize": (
            lambda: gpu_quantize.sigmoid_gate_quantize(attn, gate_up[:, : HEADS * HEAD_DIM]),
            lambda: attn.float() * up[:, : HEADS * HEAD_DIM].sigmoid(),
            t * HEADS * HEAD_DIM * 5,
        ),
        "gated_rms_norm_quantize": (
            lambda: gpu_quantize.gated_rms_norm_quantize(o, z, dw, 1e-6),
            lambda: norm.gated_rms_norm.__wrapped__(o.float(), z.float(), dw, 1e-6),
            t * FULL.values * 5,
        ),
    }
    for name, (op, truth, size) in table.items():
        yield Case(name, both(op, truth), 0.04, lambda op=op: [op] * 10, size)
    rows = 256
    cache = GDNState(*[x] * 4, torch.randn(rows + 1, 4, FULL.channels, device=DEVICE).bfloat16())
    decode = DecodeRows(torch.randperm(rows, device=DEVICE) + 1, torch.zeros(1), 2, 1)
    weight = torch.randn(FULL.channels, 4, device=DEVICE).bfloat16()
    offset = torch.randint(0, 2, (rows + 1,), device=DEVICE).int()

    def conv(op) -> tuple[Tensor, Tensor]:
        own = GDNState(*[x] * 4, cache.conv.clone())
        return op(wide[:, : FULL.channels], own, weight, decode, offset), own.conv

    def check_conv() -> float:
        pairs = zip(conv(gpu_conv.conv_decode), conv(gdn.conv_decode.__wrapped__), strict=True)
        return max(relative(a, b) for a, b in pairs)

    narrow = wide[:, : FULL.channels]
    yield Case(
        "conv_decode", check_conv, 4e-3,
        lambda: [lambda: gpu_conv.conv_decode(narrow, cache, weight, decode, offset)] * 10,
        rows * FULL.channels * 2 * (2 + 2 + 3 + 4),
    )  # fmt: skip
