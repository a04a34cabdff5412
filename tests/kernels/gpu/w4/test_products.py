"""Products with weights of 4 bits by the Triton kernel: groups, zeros, E2M1, odd sizes, splits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from millrace.kernels.gemm import W4, dequantize_w4, w4_linear
from tests.kernels.gpu.gpu_support import on_each_device, relative
from tests.kernels.test_w4 import some_weight

FEW, SPLIT, MANY = (16, 64, 128, True, 1, 4, 2), (32, 32, 32, True, 3, 4, 2), (64, 64, 64, False,
                    1, 4, 2)  # fmt: skip
CASES = [
    # tokens, outputs, inputs, group, kind, tiles
    (1, 40, 256, 128, "symmetric", FEW),
    (5, 100, 392, 128, "zeros", FEW),  # a last group of 8 columns
    (20, 72, 264, 264, "symmetric", SPLIT),  # one group
    (33, 64, 224, 32, "zeros", SPLIT),
    (70, 72, 136, 16, "floats", MANY),
    (3, 40, 200, 24, "zeros", MANY),  # groups that no step begins with
    (40, 64, 128, 64, "symmetric", MANY),
]


def on(device: str, weight: W4) -> W4:
    moved = [part.to(device) if isinstance(part, Tensor) else part for part in weight]
    return W4(*moved)  # type: ignore[arg-type]


@on_each_device
@pytest.mark.parametrize("case", CASES)
def test_product(device: str, case: tuple[int, int, int, int, str, tuple[int, ...]]) -> None:
    from millrace.kernels.gpu.gemm import w4

    tokens, outputs, inputs, group, kind, tiles = case
    weight = on(device, some_weight(outputs, inputs, group, kind, seed=tokens))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    want = x.double() @ dequantize_w4(weight).to(dtype).double().t()
    error = 4e-3 if device == "cuda" else 1e-5
    assert relative(w4.triton_matmul(x, weight, w4.Tiles(*tiles)), want) < error  # type: ignore[arg-type]
    assert relative(w4.triton_matmul(x, weight), want) < error


@on_each_device
@pytest.mark.parametrize("kind", ["symmetric", "zeros", "floats"])
def test_dequantized(device: str, kind: str) -> None:
    from millrace.kernels.gpu.gemm import w4

    weight = on(device, some_weight(40, 264, 32, kind))
    found, want = w4.dequantized(weight, torch.float32), dequantize_w4(weight)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_tiles_fill_the_gpu() -> None:
    pytest.importorskip("triton")
    from millrace.kernels.gpu.gemm.w4 import tile_rule

    assert tile_rule(16, 5120, 17408).splits == 4
    assert tile_rule(16, 34816, 5120).splits == 1
    assert tile_rule(16, 256, 512).splits == 1  # there is too little of K
    assert tile_rule(512, 5120, 5120).splits == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["symmetric", "zeros", "floats"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 200, 1500])
def test_every_way(kind: str, tokens: int) -> None:
    """Whatever is taken for this number of tokens, also in a graph."""
    for outputs, inputs, group in ((5120, 640, 128), (1000, 1032, 32)):
        weight = on("cuda", some_weight(outputs, inputs, group, kind))
        x = torch.randn(tokens, inputs, device="cuda").bfloat16()
        want = x.double() @ dequantize_w4(weight).double().t()
        found = w4_linear(x, weight)
        assert relative(found, want) < 5e-3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = w4_linear(x, weight)
        graph.replay()
        assert torch.equal(again, found)
