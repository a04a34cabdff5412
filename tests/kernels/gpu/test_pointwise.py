"""Norms, gates, quantisation, FP8 products and sampling on the GPU against the references."""

from __future__ import annotations

import pytest
import torch

from millrace.kernels import activation, gemm, lookup, norm, sampling
from tests.kernels.gpu.gpu_support import INTERPRETED, on_each_device, relative

no_fp8 = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no e4m3")


@on_each_device
@pytest.mark.parametrize("width", [64, 640, 1000, 1024, 2048, 3000])
def test_norms(device: str, width: int):
    from millrace.kernels.gpu import norm as gpu

    torch.manual_seed(width)
    x, residual = torch.randn(2, 5, width, device=device)
    weight = torch.randn(width, device=device)
    assert (
        relative(gpu.rms_norm(x, weight, 1e-6), norm.rms_norm.__wrapped__(x, weight, 1e-6)) < 1e-5
    )
    want = norm.add_rms_norm.__wrapped__(x, residual, weight, 1e-6)
    got = gpu.add_rms_norm(x, residual, weight, 1e-6)
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@on_each_device
@pytest.mark.parametrize("dim", [32, 48, 128])
def test_gated_norm(device: str, dim: int):
    from millrace.kernels.gpu import norm as gpu

    torch.manual_seed(dim)
    o = torch.randn(5, 3, dim, device=device)
    z = torch.randn(5, 1000, device=device)[:, 7 : 7 + 3 * dim].unflatten(1, (3, dim))
    weight = torch.randn(dim, device=device)
    want = norm.gated_rms_norm.__wrapped__(o, z, weight, 1e-6)
    assert relative(gpu.gated_rms_norm(o, z, weight, 1e-6), want) < 1e-5


@on_each_device
def test_gates(device: str):
    from millrace.kernels.gpu import activation as gpu

    torch.manual_seed(0)
    gate_up = torch.randn(5, 600, device=device) * 10
    assert relative(gpu.silu_mul(gate_up), activation.silu_mul.__wrapped__(gate_up)) < 1e-5
    x, gate = torch.randn(5, 300, device=device), gate_up[:, 150:450]
    want = activation.sigmoid_gate.__wrapped__(x, gate)
    assert relative(gpu.sigmoid_gate(x, gate), want) < 1e-5


@on_each_device
@no_fp8
def test_quantize_rounds_each_group_to_e4m3(device: str):
    from millrace.kernels.gpu.quantize import quantize

    torch.manual_seed(1)
    x = torch.randn(6, 300, device=device) * torch.logspace(-6, 6, 6, device=device)[:, None]
    x[2, 128:256] = 0
    values, scales = quantize(x)
    padded = torch.nn.functional.pad(x, (0, 84)).view(6, 3, 128)
    want = padded.abs().amax(-1).clamp(min=1e-10) / 448
    assert relative(scales, want) < 1e-6
    exact = (padded / want[..., None]).to(torch.float8_e4m3fn).view(6, 384)[:, :300]
    differs = values.view(torch.uint8) != exact.view(torch.uint8)
    assert differs.float().mean().item() < 0.01  # a division that rounds to the other side


@on_each_device
@no_fp8
@pytest.mark.parametrize("shape", [(256, 256), (384, 640), (200, 300)])
@pytest.mark.parametrize("tokens", [1, 3, 64, 65, 300])
def test_fp8_linear(device: str, tokens: int, shape: tuple[int, int]):
    from millrace.kernels.gpu.gemm import fp8 as gpu
    from millrace.kernels.gpu.quantize import quantize

    torch.manual_seed(tokens)
    out, width = shape
    weight = (torch.randn(shape, device=device) * 64).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-out // 128), -(-width // 128), device=device)
    x = torch.randn(tokens, width, device=device).bfloat16()
    q = quantize(x)
    rounded = q.values.float() * q.scales.repeat_interleave(128, 1)[:, :width]
    want = rounded.double() @ gemm.dequantize(weight, scale).double().t()
    assert relative(gpu.fp8_linear(x, weight, scale, x.dtype), want) < 4e-3
    assert relative(gpu.triton_matmul(q, weight, scale, torch.float32), want) < 1e-3


@on_each_device
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("filters", [False, True])
def test_sample(device: str, filters: bool, noise: bool):
    from millrace.kernels.gpu import sampling as gpu

    torch.manual_seed(7)
    logits = torch.randn(6, 5000, device=device) * 2
    logits[0, 7:20] = -torch.inf
    logits[3, [100, 200]] = 50.0
    values = {
        "temperature": torch.tensor([0.0, 1, 1, 0, 0.5, 2]),
        "top_p": torch.tensor([1, 0.9, 1, 1, 0.5, 0.99]),
        "top_k": torch.tensor([0, 0, 5, 0, 50, -1]),
        "seed": torch.tensor([1, -2, 3, 2**62, 5, 6]),
        "position": torch.arange(6) * 1000,
    }
    args = {name: value.to(device) for name, value in values.items()}
    want = sampling.sample.__wrapped__(logits, **args, noise=noise, filters=filters)
    got = gpu.sample(logits, **args, noise=noise, filters=filters)
    assert got.tolist() == want.tolist()


@on_each_device
@pytest.mark.parametrize("noise", [False, True])
def test_best_of_a_part(device: str, noise: bool):
    from millrace.kernels.gpu import sampling as gpu

    torch.manual_seed(9)
    logits = torch.randn(4, 9000, device=device)
    logits[0, [4095, 4096, 8500]] = 9.0
    logits[1] = -torch.inf
    logits[2] = -logits[2].abs()
    logits[2, [5000, 6000]] = torch.tensor([-0.0, 0.0], device=device)
    heat = torch.tensor([0.0, 0, 0, 1], device=device)
    seed = torch.tensor([1, -2, 3, 2**62], device=device)
    given = (heat, seed, seed * 7)
    parts = [(0, 4096), (4096, 8999), (8999, 9000), (9000, 9000)]
    found = []
    for start, stop in parts:
        part = logits[:, start:stop]
        found.append(gpu.best(part, *given, start, noise=noise))
        want = sampling.best.__wrapped__(part, *given, start, noise=noise)
        assert sampling.token_of(found[-1]).tolist() == sampling.token_of(want).tolist()
        if not noise:
            assert found[-1].tolist() == want.tolist()
    ones, zeros = torch.ones_like(heat), torch.zeros_like(seed)
    all_at_once = gpu.sample(logits, heat, ones, zeros, seed, seed * 7, noise=noise, filters=False)
    assert sampling.token_of(torch.stack(found).amax(0)).tolist() == all_at_once.tolist()


@on_each_device
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("filters", [False, True])
def test_a_row_that_is_not_finite_samples_what_shows_it(device: str, filters: bool, noise: bool):
    """Also where only one logit is NaN, and where a block's padding is all that is not NaN."""
    from millrace.kernels.gpu import sampling as gpu

    torch.manual_seed(8)
    logits = torch.randn(6, 5000, device=device)
    logits[0] = torch.nan
    logits[1, 4999] = torch.nan
    logits[2, 10] = torch.inf
    logits[3] = -torch.inf
    logits[4, 4096:] = -torch.inf
    ones, seed = torch.ones(6, device=device), torch.arange(6, device=device)
    tokens = gpu.sample(
        logits, ones, ones * 0.9, seed * 0 + 20, seed, seed, noise=noise, filters=filters
    )
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 5000
    usable = [False, False, False, True, True, True]
    assert (sampling.checked(logits, tokens) != sampling.NOT_FINITE).tolist() == usable
    parts = [(0, 4096), (4096, 5000)]
    found = [gpu.best(logits[:, a:b], ones, seed, seed, a, noise=noise) for a, b in parts]
    largest = torch.stack(found).amax(0)
    assert (sampling.checked_token_of(largest) != sampling.NOT_FINITE).tolist() == usable


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 brings many ties
@pytest.mark.parametrize("vocab", [40, 1000, 4097])
def test_keep_threshold(device: str, vocab: int, dtype: torch.dtype):
    from millrace.kernels.gpu import sampling as gpu

    torch.manual_seed(vocab)
    top_k = torch.tensor([0, 1, 3, 20, 39, 40, 64, 500, 5000, 20, 0, 2], device=device)
    top_p = torch.tensor([0.5, 1, 1, 0.95, 0.01, 1, 0.9, 1, 0.3, 0.999, 0.999, 0.0001])
    heat = torch.tensor([1, 1, 0, 0.7, 1, 1, 2, 1, 1, 0.1, 3, 1], dtype=torch.float32)
    logits = (torch.randn(12, vocab, device=device) * 3).to(dtype)
    logits[4, 5:] = -torch.inf
    want = sampling.keep_threshold(logits.float(), heat.to(device), top_p.to(device), top_k)
    got = gpu.keep_threshold(logits, heat.to(device), top_p.to(device), top_k)
    # Where top_p ends, sums that differ in their last bit may keep one token more or less.
    kept = [(logits.float() >= floor[:, None]).sum(1) for floor in (want, got)]
    ties = [(logits.float() == floor[:, None]).sum(1) for floor in (want, got)]
    assert bool(((kept[0] - kept[1]).abs() <= torch.maximum(*ties) * (top_p.to(device) < 1)).all())
    assert int((kept[0] != kept[1]).sum()) <= 1


@on_each_device
@pytest.mark.parametrize("top_p", [1e-46, 1e-38, 1e-9])
def test_a_tiny_top_p_keeps_the_likeliest(device: str, top_p: float):
    """In float32 it may be 0, of which no logit has as much."""
    from millrace.kernels.gpu import sampling as gpu

    torch.manual_seed(8)
    logits, ones = torch.randn(3, 300, device=device) * 3, torch.ones(3, device=device)
    zeros = torch.zeros(3, dtype=torch.int64, device=device)
    drawn = gpu.sample(logits, ones, ones * top_p, zeros, zeros, zeros, noise=True, filters=True)
    assert drawn.tolist() == logits.argmax(1).tolist()


@on_each_device
@pytest.mark.parametrize("kind", ["flat", "even", "peaky", "equal", "rounded"])
def test_keep_threshold_of_many_tokens(device: str, kind: str):
    """Rows of which nearly all, a few, or equal tokens are looked at again."""
    from millrace.kernels.gpu import threshold as gpu

    torch.manual_seed(3)
    top_p = torch.tensor([0.9, 0.2, 0.9, 0.5, 1, 0.9999], device=device)
    top_k = torch.tensor([0, 0, 5000, 20, 3000, 6000], device=device)
    logits = torch.randn(6, 6000, device=device)
    if kind == "even":  # many share 12 bits, few 16
        logits = logits * 0.1 + 1.06
    elif kind == "peaky":
        logits *= 8
    elif kind == "equal":
        logits.fill_(1.5)
    elif kind == "rounded":
        logits = (logits * 2).bfloat16().float()
    heat = torch.tensor([1, 1, 1, 1, 0.5, 2], device=device)
    want = sampling.keep_threshold(logits, heat, top_p, top_k)
    got = gpu.keep_threshold(logits, heat, top_p, top_k)
    # Sums that differ in their last bits may end top_p some tokens earlier or later.
    ranks = [(logits > floor[:, None]).sum(1) for floor in (want, got)]
    ties = [(logits == floor[:, None]).sum(1) for floor in (want, got)]
    assert bool((torch.stack(ties) > 0).all())
    assert bool(((ranks[0] - ranks[1]).abs() <= 2 * torch.maximum(*ties) * (top_p < 1)).all())


@on_each_device
def test_noise_is_the_reference_noise(device: str):
    """Each token in turn is made the likely one, so that every noise value decides some draw."""
    from millrace.kernels.gpu import sampling as gpu

    vocab = 96
    noise = sampling.gumbel(torch.tensor([5]), torch.tensor([9]), vocab)[0]
    logits = -noise.expand(vocab, -1).clone() + 1e-4 * torch.eye(vocab)
    rows = torch.ones(vocab)
    got = gpu.sample(
        *(x.to(device) for x in (logits, rows, rows, rows.long() * 0, rows.long() * 5,
                                 rows.long() * 9)), filters=False,
    )  # fmt: skip
    assert got.tolist() == list(range(vocab))


@on_each_device
def test_copy_rows(device: str):
    """Of every layer, and the front of rows that differ in length."""
    from millrace.kernels import copy
    from millrace.kernels.gpu import copy as gpu

    torch.manual_seed(1)
    source = torch.randn(3, 6, 5, 700, device=device)
    rows, to_rows = torch.tensor([[4, 0], [1, 3]], device=device).unbind(1)
    rows, to_rows = torch.tensor([4, 1], device=device), to_rows  # a column of a table too
    for height in (5, 3, 7):
        to, want = (torch.zeros(3, 4, height, 700, device=device) for _ in range(2))
        copy.copy_rows.__wrapped__(want, to_rows, source, rows)
        gpu.copy_rows(to, to_rows, source, rows)
        assert torch.equal(to, want)
        assert torch.equal(to[:, 3, :3], source[:, 1, :3])
        assert not to[:, 1].any()


@on_each_device
@pytest.mark.parametrize(("length", "longest"), [(1, 4), (50, 1), (3000, 5), (5000, 24)])
def test_matches_are_those_of_the_reference(device: str, length: int, longest: int):
    """Rows of all lengths up to `length`, over few tokens, so that matches are long."""
    from millrace.kernels.gpu import lookup as gpu

    torch.manual_seed(length)
    tokens = torch.randint(0, 3, (6, length + 7), device=device)
    tokens[2] = 1
    slots = torch.tensor([4, 2, 0, 5], device=device)
    ends = torch.tensor([length, max(1, length // 2), 1, max(1, length - 3)], device=device)
    for context in (length, length + 4000):  # several parts
        want = lookup.longest_match.__wrapped__(tokens, slots, ends, longest, length)
        got = gpu.longest_match(tokens, slots, ends, longest, context)
        assert torch.equal(got, want)
