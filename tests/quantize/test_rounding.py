"""Rounding to int4 and e4m3: nearest values, scales, and what GPTQ is better at."""

from __future__ import annotations

import pytest
import torch

from millrace.kernels.gemm import dequantize
from millrace.quantize.rounding import gptq_int4, round_fp8, round_int4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_each_value_is_the_nearest_of_its_group() -> None:
    weight = torch.randn(7, 96)
    found = round_int4(weight, 32)
    assert found.scales.dtype == torch.bfloat16
    assert found.scales.shape == (7, 3)
    assert (found.values.min(), found.values.max()) == (-8, 7)
    scales = found.scales.float().repeat_interleave(32, 1)
    grid = torch.arange(-8, 8).float()
    nearest = ((weight / scales).unsqueeze(2) - grid).abs().amin(2)
    torch.testing.assert_close((weight / scales - found.values).abs(), nearest, atol=1e-5, rtol=0)


def test_scales_leave_less_error_than_those_of_the_largest_value() -> None:
    weight = torch.randn(64, 128)
    error = (round_int4(weight, 128).dequantize() - weight).norm() / weight.norm()
    scales = weight.abs().amax(1, keepdim=True) / 7.5
    simple = (weight / scales).round().clamp(-8, 7) * scales
    assert error < 0.97 * (simple - weight).norm() / weight.norm()


def test_zeros_stay_zeros() -> None:
    assert not round_int4(torch.zeros(3, 64), 32).dequantize().any()


def test_gptq_keeps_the_outputs_of_inputs_that_depend_on_each_other() -> None:
    inputs, weight = torch.randn(400, 40) @ torch.randn(40, 192), torch.randn(48, 192)
    found = gptq_int4(weight, inputs.t() @ inputs, 64)
    assert found.values.abs().max() <= 8
    want = inputs @ weight.t()
    errors = [
        ((inputs @ one.dequantize().t() - want).norm() / want.norm()).item()
        for one in (found, round_int4(weight, 64))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_gptq_with_inputs_that_are_never_there() -> None:
    """A channel without inputs becomes zero; nothing becomes NaN."""
    inputs, weight = torch.randn(100, 64), torch.randn(8, 64)
    inputs[:, 5] = 0
    found = gptq_int4(weight, inputs.t() @ inputs, 32).dequantize()
    assert not found[:, 5].any()
    assert bool(found.isfinite().all())


def test_independent_inputs_need_no_corrections() -> None:
    weight = torch.randn(8, 64)
    assert torch.equal(gptq_int4(weight, torch.eye(64), 32).values, round_int4(weight, 32).values)


def test_fp8_of_any_size() -> None:
    weight = torch.randn(130, 200)
    weight[:128, :128] *= 1e-4
    values, scales = round_fp8(weight)
    assert scales.shape == (2, 2)
    found = dequantize(values, scales)
    for rows, columns in ((slice(0, 128), slice(0, 128)), (slice(128, 130), slice(128, 200))):
        error = (found - weight)[rows, columns].norm() / weight[rows, columns].norm()
        assert error < 0.04
