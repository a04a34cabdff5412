"""Norms, gates, rotary tables, FP8 GEMMs: each against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from millrace.kernels.activation import sigmoid_gate, silu_mul
from millrace.kernels.dispatch import op
from millrace.kernels.gemm import dequantize, fp8_linear, linear, quantize_blocks
from millrace.kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from millrace.kernels.rope import apply_rope, rope_table

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 40).to(dtype), (0.3 * torch.randn(40)).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact * weight.double()
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    else:  # rounded once: rarely another neighbour than the exact value's
        assert float((out == exact.to(dtype)).float().mean()) > 0.95


def test_add_rms_norm_norms_the_rounded_sum() -> None:
    x, residual = (torch.randn(5, 16).to(torch.bfloat16) for _ in range(2))
    weight = torch.randn(16).to(torch.bfloat16)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert bool((total == x + residual).all())
    assert bool((normed == rms_norm(total, weight, 1e-6)).all())


def test_gated_rms_norm() -> None:
    o, z, weight = torch.randn(6, 3, 8), torch.randn(6, 3, 8), torch.randn(8)
    o64, z64 = o.double(), z.double()
    exact = o64 / (o64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    exact = (exact * z64 * torch.sigmoid(z64)).flatten(1)
    torch.testing.assert_close(
        gated_rms_norm(o, z, weight, 1e-6).double(), exact, rtol=1e-5, atol=1e-6
    )


def test_activations() -> None:
    gate_up, x = torch.randn(4, 20), torch.randn(4, 10)
    gate, up = gate_up[:, :10], gate_up[:, 10:]
    torch.testing.assert_close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)
    torch.testing.assert_close(sigmoid_gate(x, gate), x / (1 + (-gate).exp()))


def test_rope_turns_pairs_and_leaves_the_rest() -> None:
    table = rope_table(16, 8, 1e4, 50, None, "cpu")
    x, positions = torch.randn(3, 2, 16), torch.tensor([0, 7, 49])
    out = apply_rope(x, positions, table)
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position / 1e4 ** (i / 4)
            pair = torch.complex(x[t, :, i], x[t, :, i + 4]) * complex(
                math.cos(angle), math.sin(angle)
            )
            torch.testing.assert_close(out[t, :, i], pair.real, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out[t, :, i + 4], pair.imag, rtol=1e-4, atol=1e-5)
    assert bool((out[..., 8:] == x[..., 8:]).all())


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (130, 200), (64, 300), (1, 1)])
def test_fp8_linear(rows: int, columns: int) -> None:
    weight = (40 * torch.randn(rows, columns)).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) / 40
    exact = torch.tensor(
        [
            [float(weight[i, j].float() * scale[i // 128, j // 128]) for j in range(columns)]
            for i in range(rows)
        ]
    )
    assert bool((dequantize(weight, scale) == exact).all())
    x = torch.randn(5, columns)
    torch.testing.assert_close(fp8_linear(x, weight, scale, x.dtype), linear(x, exact))


@pytest.mark.parametrize("shape", [(256, 384), (130, 65), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_rounded_each_by_its_largest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Half of the last of e4m3's 4 bits of a value, or of what is tiny beside its block's largest;
    blocks far larger, zero, and cut off by an edge among them."""
    weight = torch.randn(shape)
    weight[:, 128:256] *= 1e6
    weight[128:, :128] = 0.0
    weight = weight.to(dtype)
    rounded, scale = quantize_blocks(weight)
    assert (rounded.dtype, rounded.shape) == (torch.float8_e4m3fn, weight.shape)
    assert scale.shape == tuple(-(-size // 128) for size in shape)
    largest = (scale * 448).repeat_interleave(128, 0).repeat_interleave(128, 1)
    largest = largest[: shape[0], : shape[1]]
    error = (dequantize(rounded, scale) - weight.float()).abs()
    allowed = torch.maximum(weight.float().abs() / 16, largest / 448 * 2**-10)
    assert bool((error <= allowed * 1.0001).all())
    assert float(largest[0, 0]) == pytest.approx(float(weight[:128, :128].abs().max()), rel=1e-6)
    assert bool((rounded.float().abs() == 448).any())


def test_cpu_tensors_run_the_reference() -> None:
    """Of the same name, whatever the device's fast path would be."""
    calls = []

    @op
    def probe(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x

    x = torch.ones(1)
    assert probe(x) is x
    assert len(calls) == 1
