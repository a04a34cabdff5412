"""Drawing tokens: noise, temperature, and cuts of flat and of peaked logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernel_cases.case import Case
from kernel_cases.shapes import DEVICE, VOCAB
from millrace.kernels import sampling
from millrace.kernels.gpu import sampling as gpu_sampling


def cases(quick: bool) -> Iterator[Case]:
    def inputs(rows: int, **cut: float) -> dict[str, Tensor]:
        return {
            "temperature": torch.ones(rows, device=DEVICE),
            "top_p": torch.full((rows,), cut.get("top_p", 1.0), device=DEVICE),
            "top_k": torch.full((rows,), int(cut.get("top_k", 0)), device=DEVICE),
            "seed": torch.randint(-(2**62), 2**62, (rows,), device=DEVICE),
            "position": torch.arange(rows, device=DEVICE),
        }

    def check(**cut: float) -> float:
        """Share of tokens that differ from the reference; NaN never compares equal."""
        logits = torch.randn(64, VOCAB, device=DEVICE) * 3
        args = inputs(64, **cut)
        got = gpu_sampling.sample(logits, **args, filters=bool(cut))
        want = sampling.sample.__wrapped__(logits, **args, filters=bool(cut))
        return (got != want).float().mean().item()

    for rows, noise, cut, spread in (
        (512, False, {}, 1), (512, True, {}, 1), (2, True, {}, 1),
        (512, True, {"top_k": 50}, 1), (512, True, {"top_k": 20, "top_p": 0.95}, 1),
        (512, True, {"top_p": 0.9}, 1), (512, True, {"top_p": 0.9}, 6),
        (2, True, {"top_p": 0.9}, 6),
    ):  # fmt: skip

        def calls(rows=rows, noise=noise, cut=cut, spread=spread):
            logits = torch.randn(rows, VOCAB, device=DEVICE) * spread
            args = inputs(rows, **cut)
            return [lambda: gpu_sampling.sample(logits, **args, noise=noise, filters=bool(cut))] * 2

        name = f"{rows} rows noise={noise} {cut}" + f" spread {spread}" * (spread > 1)
        yield Case(
            name, lambda cut=cut: check(**cut), 0.02, calls, rows * VOCAB * 4.0,
        )  # fmt: skip
