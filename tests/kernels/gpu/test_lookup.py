"""Looking up a sequence's last tokens on the GPU against the reference."""

from __future__ import annotations

import pytest
import torch

from millrace.kernels import lookup
from tests.kernels.gpu.gpu_support import on_each_device


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
