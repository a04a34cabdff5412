"""GEMMs with weights of 4 bits: the reference against its formula, the CPU's path against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from millrace.kernels.cpu import w4 as cpu_w4
from millrace.kernels.cpu.call import function
from millrace.kernels.gemm import E2M1, W4, dequantize_w4, linear, pack, unpack, w4_linear


def some_weight(
    outputs: int, inputs: int, group: int, kind: str = "symmetric", seed: int = 0
) -> W4:
    """kind: symmetric, zeros or floats."""
    torch.manual_seed(seed)
    groups = -(-inputs // group)
    codes = torch.randint(-(2**31), 2**31, (outputs, inputs // 8), dtype=torch.int64)
    zeros = torch.randint(0, 17, (outputs, groups), dtype=torch.uint8)
    return W4(
        codes.to(torch.int32),
        (torch.rand(outputs, groups) * 0.02 + 1e-3).half(),
        torch.rand(outputs, 1) + 0.5,
        zeros if kind == "zeros" else None,
        group,
        kind == "floats",
    )


def definition(weight: W4) -> Tensor:
    """float64, one number after the other."""
    outputs, inputs = weight.shape
    found = torch.empty(outputs, inputs, dtype=torch.float64)
    for n in range(outputs):
        for k in range(inputs):
            code = (int(weight.codes[n, k // 8]) & 0xFFFFFFFF) >> 4 * (k % 8) & 15
            g = k // weight.group
            zero = 8 if weight.zeros is None else int(weight.zeros[n, g])
            value = E2M1[code] if weight.floats else code - zero
            found[n, k] = value * float(weight.scales[n, g]) * float(weight.factor[n])
    return found


KINDS = ["symmetric", "zeros", "floats"]
SHAPES = [(8, 32, 32), (33, 40, 16), (100, 136, 128), (64, 256, 24), (20, 264, 264)]


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_its_definition(kind: str) -> None:
    weight = some_weight(5, 72, 32, kind)
    torch.testing.assert_close(
        dequantize_w4(weight).double(), definition(weight), rtol=1e-6, atol=0
    )


def test_pack_undoes_unpack() -> None:
    codes = some_weight(7, 64, 32).codes
    assert torch.equal(pack(unpack(codes)), codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_linear(kind: str, dtype: torch.dtype, outputs: int, inputs: int, group: int) -> None:
    """As exact as one rounding of weights and results; no row depends on others; NaN stays where
    it is."""
    weight = some_weight(outputs, inputs, group, kind, seed=outputs)
    for tokens in (1, 2, 13):
        x = torch.randn(tokens, inputs).to(dtype)
        want = x.double() @ dequantize_w4(weight).to(dtype).double().t()
        found = w4_linear(x, weight)
        error = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), want, rtol=error, atol=error / 4)
        if cpu_w4.w4_linear(x, weight) is not NotImplemented:
            assert torch.equal(w4_linear(x[-1:], weight)[0], found[-1])
            x[0] = torch.nan
            assert bool(w4_linear(x, weight)[0].isnan().all())
            assert torch.equal(w4_linear(x, weight)[1:], found[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_the_dequantized_weight(kind: str) -> None:
    """Bit for bit, where both are compiled: so are a model's tokens."""
    if function("w4_linear") is None or not cpu_w4.is_supported():
        pytest.skip("no compiled function on this machine")
    weight = some_weight(96, 256, 128, kind)
    plain = dequantize_w4(weight).bfloat16()
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 256).bfloat16()
        assert torch.equal(w4_linear(x, weight), linear(x, plain))


def test_rows_from() -> None:
    weight, x = some_weight(48, 64, 32, "zeros"), torch.randn(3, 64)
    torch.testing.assert_close(w4_linear(x, weight.rows_from(16)), w4_linear(x, weight)[:, 16:])
