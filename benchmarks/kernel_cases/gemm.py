"""FP8 products of the model's shapes: every way to make them, at many tokens and at few."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernel_cases.case import Case, relative
from kernel_cases.shapes import DEVICE
from millrace.common.optional import probe
from millrace.kernels import gemm
from millrace.kernels.gpu import quantize as gpu_quantize
from millrace.kernels.gpu.gemm import few
from millrace.kernels.gpu.gemm import fp8 as gpu_gemm

GEMM_SHAPES = {
    "qkv_gate": (14336, 5120),
    "attn_o": (5120, 6144),
    "gate_up": (34816, 5120),
    "down": (5120, 17408),
    "gdn_qkvz": (16384, 5120),
}


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


def cases(quick: bool) -> Iterator[Case]:
    ways: dict[str, Callable[..., Tensor]] = {}
    if probe("deep_gemm").module is not None:
        ways["deepgemm"] = gpu_gemm.deep_gemm_matmul
    if not (quick and ways):
        ways["cublas"] = gpu_gemm.cublas_matmul
    small = [(0, 64, True, 4, 6)]
    large = [(64, 128, False, 4, 4), (64, 128, False, 4, 3), (128, 128, False, 8, 3)]
    for tokens in (64, 512, 1536, 8192) if quick else (2, 16, 64, 256, 512, 896, 1536, 8192):
        named = dict(ways)
        for config in small if tokens <= 64 else large:
            full = (max(16, tokens), *config[1:]) if tokens <= 64 else config

            def run(q, w, s, full=full):
                return gpu_gemm.triton_matmul(q, w, s, torch.bfloat16, full)

            if not quick and (tokens < 8192 or config == large[2]):
                named[f"triton{config[1:] if tokens <= 64 else config}"] = run
        for name in GEMM_SHAPES:
            for way, run in named.items():
                if tokens not in (896, 1536) or way in ("deepgemm", "cublas"):
                    yield product_case(name, tokens, way, run)


def few_cases(quick: bool) -> Iterator[Case]:
    """At most 8 tokens, a dozen calls to a graph. Our kernel should take its floor and 2.5 us: some
    20 us for qkv_gate, 10 for attn_o, 45 for gate_up, 24 for down, 22 for gdn_qkvz."""
    ways: dict[str, Callable[..., Tensor | None]] = {"few": few.few_matmul}
    if probe("deep_gemm").module is not None:
        ways["deepgemm"] = gpu_gemm.deep_gemm_matmul
    if not (quick and len(ways) > 1):
        ways["cublas"] = gpu_gemm.cublas_matmul
    for tokens in (1, 2, 4, 8):
        for name in GEMM_SHAPES:
            for way, run in ways.items():
                yield product_case(name, tokens, way, run, calls=12)
