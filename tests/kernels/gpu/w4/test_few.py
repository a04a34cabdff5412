"""Products of few tokens with weights of 4 bits: the CUDA kernel on a GPU, its indices on a CPU.

Without a GPU the same source runs through g++, its warps emulated (cuda_on_cpu.h).
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millrace.kernels.gemm import W4, dequantize_w4
from millrace.kernels.gpu.gemm import w4_few
from millrace.kernels.gpu.gemm.w4_few import (
    LONG,
    NARROW,
    SMALL,
    SMALL_WIDE,
    WIDE,
    Form,
)
from tests.kernels.gpu.gpu_support import INTERPRETED, relative
from tests.kernels.test_w4 import some_weight

HERE = Path(__file__).parents[1]
ENTRY = """
#include "cuda_on_cpu.h"
inline uint32_t low_halves(uint32_t a, uint32_t b) {{ return (a & 0xffff) | b << 16; }}
inline uint32_t high_halves(uint32_t a, uint32_t b) {{ return a >> 16 | (b & 0xffff0000u); }}
{source}
static const u16 *X, *SCALES;
static const u8 *CODES, *NOUGHTS;
static const float* FACTOR;
static u16* OUTPUT;
static int COUNT, OUTPUTS, WIDTH, GROUPS;
static void one() {{
  w4_few(X, CODES, SCALES, NOUGHTS, FACTOR, OUTPUT, COUNT, OUTPUTS, WIDTH, GROUPS);
}}
extern "C" void run(const u16* x, const u8* codes, const u16* scales, const u8* zeros,
                    const float* factor, u16* out, int t, int outputs, int width, int groups) {{
  X = x, CODES = codes, SCALES = scales, NOUGHTS = zeros, FACTOR = factor, OUTPUT = out;
  COUNT = t, OUTPUTS = outputs, WIDTH = width, GROUPS = groups;
  launch(outputs / ROWS, 32 * WARPS, one);
}}
"""
Product = Callable[[Tensor, W4], Tensor]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Form], Product]:
    """The kernel on the CPU, in one of its forms."""
    directory = tmp_path_factory.mktemp("w4")
    libraries: dict[str, ctypes.CDLL] = {}

    def compiled(form: Form, zeros: bool) -> ctypes.CDLL:
        name = f"{form.tiles}-{form.depth}-{zeros}"
        if name not in libraries:
            stem = directory / name
            stem.with_suffix(".cpp").write_text(ENTRY.format(source=w4_few.source(form, zeros)))
            command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", "-o"]
            subprocess.run([*command, f"{stem}.so", f"{stem}.cpp"], check=True, timeout=120)
            libraries[name] = ctypes.CDLL(f"{stem}.so")
        return libraries[name]

    def of_form(form: Form) -> Product:
        def product(x: Tensor, weight: W4) -> Tensor:
            (outputs, width), groups = weight.shape, weight.scales.shape[1]
            out = torch.full((len(x), outputs), torch.nan, dtype=torch.bfloat16)
            zeros = weight.codes if weight.zeros is None else weight.zeros
            tensors = (x, weight.codes, weight.scales, zeros, weight.factor, out)
            compiled(form, weight.zeros is not None).run(
                *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
                len(x), outputs, width, groups,
            )  # fmt: skip
            return out

        return product

    return of_form


def exact(x: Tensor, weight: W4) -> Tensor:
    return x.double() @ dequantize_w4(weight).double().t()


on_cpu = pytest.mark.skipif(INTERPRETED, reason="runs without Triton")


@on_cpu
@pytest.mark.parametrize(
    ("form", "tokens", "width", "group", "kind"),
    [
        (NARROW, 1, 256, 128, "symmetric"),
        (NARROW, 3, 640, 128, "zeros"),  # 5 groups: the last run has one
        (WIDE, 8, 384, 128, "zeros"),
        (SMALL, 2, 1152, 128, "symmetric"),
        (SMALL_WIDE, 8, 640, 128, "symmetric"),
        (LONG, 1, 2432, 128, "symmetric"),
        (WIDE, 5, 2304, 2304, "symmetric"),  # one group for all; more runs than warps
    ],
)
def test_emulated_product(
    emulated: Callable[[Form], Product], form: Form, tokens: int, width: int, group: int, kind: str
) -> None:
    weight = some_weight(64, width, group, kind, seed=tokens)
    x = torch.randn(tokens, width).bfloat16()
    assert relative(emulated(form)(x, weight), exact(x, weight)) < 3e-3


@on_cpu
def test_emulated_rows_do_not_depend_on_their_number(
    emulated: Callable[[Form], Product],
) -> None:
    weight, x = some_weight(32, 1152, 128, "zeros"), torch.randn(8, 1152).bfloat16()
    product = emulated(WIDE)
    whole = product(x, weight)
    for first, last in ((0, 1), (3, 5), (7, 8), (1, 8)):
        assert torch.equal(product(x[first:last].clone(), weight), whole[first:last])


@on_cpu
def test_every_channel_meets_its_own(emulated: Callable[[Form], Product]) -> None:
    """Identity tokens: an exchanged channel would show."""
    codes = some_weight(32, 128, 128, seed=3).codes
    weight = W4(codes, torch.ones(32, 1).half(), torch.ones(32, 1), None, 128)
    for first in range(0, 128, 8):
        got = emulated(NARROW)(torch.eye(128)[first : first + 8].bfloat16(), weight)
        assert torch.equal(got.float(), dequantize_w4(weight).t()[first : first + 8])


def test_refuses_what_it_cannot_multiply() -> None:
    x = torch.randn(2, 256).bfloat16()
    for weight in (
        some_weight(24, 256, 128), some_weight(32, 256, 64), some_weight(32, 256, 16, "floats")
    ):  # fmt: skip
        assert not w4_few.takes(x, weight)
    good = some_weight(32, 256, 128)
    assert w4_few.takes(x, good)
    assert not w4_few.takes(torch.randn(9, 256).bfloat16(), good)
    assert not w4_few.takes(x.float(), good)


def on_gpu(x: Tensor, weight: W4, form: Form | None = None) -> Tensor:
    out = w4_few.w4_few(x, weight, form)
    assert out is not None
    return out


def to_gpu(weight: W4) -> W4:
    moved = [part.cuda() if isinstance(part, Tensor) else part for part in weight]
    return W4(*moved)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["symmetric", "zeros"])
@pytest.mark.parametrize(("outputs", "width"), [(128, 128), (5120, 640), (384, 5248)])
@pytest.mark.parametrize("form", [NARROW, WIDE, SMALL, SMALL_WIDE, LONG])
def test_product(form: Form, outputs: int, width: int, kind: str) -> None:
    weight = to_gpu(some_weight(outputs, width, 128, kind))
    for tokens in (1, 2, 3, 7, 8):
        x = torch.randn(tokens, width, device="cuda").bfloat16()
        got = on_gpu(x, weight, form)
        assert relative(got, exact(x, weight)) < 3e-3
        assert torch.equal(on_gpu(x[-1:].clone(), weight, form)[0], got[-1])
