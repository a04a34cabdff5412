"""Mixture of experts: which experts a token goes to, and what they make of it.

The references read no count on the host, so they can be captured in a graph; the price is that
every expert sees every token. Fast paths group the tokens by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.activation import silu_mul
from millrace.kernels.dispatch import by_token, op
from millrace.kernels.gemm import (
    CODES_PER_WORD,
    W4,
    dequantize,
    dequantize_w4,
    linear,
    multiply,
    w4_linear,
)
from millrace.kernels.quantize import Quantized


class ExpertWeights(NamedTuple):
    """One linear layer of all experts.

    values: [E, out, in], in the dtype of the inputs, or e4m3 with scales, float32 [E, out / 128,
    in / 128], for its blocks of 128 x 128. Or, if there is a factor, all fields are those of a
    `W4` for each expert, and values are its codes.
    """

    values: Tensor
    scales: Tensor | None = None
    factor: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0
    floats: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, outputs, inputs."""
        count, outputs, inputs = self.values.shape
        return count, outputs, inputs * (1 if self.factor is None else CODES_PER_WORD)

    def of(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The weight of one expert, [out, in]."""
        if self.factor is not None:
            return dequantize_w4(self._w4(expert)).to(dtype)
        if self.scales is None:
            return self.values[expert]
        return dequantize(self.values[expert], self.scales[expert]).to(dtype)

    def multiply(self, expert: int, x: Tensor) -> Tensor:
        """x @ the weight of one expert^T. x: [T, in]."""
        if self.factor is not None:
            return w4_linear(x, self._w4(expert))
        return linear(x, self.of(expert, x.dtype))

    def _w4(self, expert: int) -> W4:
        assert self.scales is not None
        assert self.factor is not None
        zeros = None if self.zeros is None else self.zeros[expert]
        scales, factor = self.scales[expert], self.factor[expert]
        return W4(self.values[expert], scales, factor, zeros, self.group, self.floats)


class Routes(NamedTuple):
    """experts: int64 [T, K], int32 on a GPU, the best first, all different; -1: one of another
    rank, which adds nothing here. weights: [T, K], of their outputs."""

    experts: Tensor
    weights: Tensor


class Shared(NamedTuple):
    """What a shared expert adds: sigmoid(gate) * out. out: [T, H]; gate: [T, 1]."""

    out: Tensor
    gate: Tensor


@op
def route(logits: Tensor, top_k: int, normalize: bool, shared_gate: Tensor | None = None) -> Routes:
    """The experts with the `top_k` largest logits [T, E] of each token.

    Of equal logits the lower expert comes first, so that every device and rank decides alike.
    Weights are the softmax over all experts, in float32, divided by their sum if `normalize`, then
    rounded to the dtype of the logits. shared_gate: [T, 1]; with it every token goes to expert E,
    too, the last, with the weight sigmoid(shared_gate).
    """
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = logits.float().softmax(-1).gather(1, chosen)
    if normalize:
        weights = weights / _column_sum(weights)
    if shared_gate is not None:
        chosen = F.pad(chosen, (0, 1), value=logits.shape[1])
        weights = torch.cat([weights, _sigmoid(shared_gate)], dim=-1)
    return Routes(chosen, weights.to(logits.dtype))


def _column_sum(weights: Tensor) -> Tensor:
    """The sum of each row, [T, 1], in the order of its columns."""
    total = weights[:, :1]
    for column in range(1, weights.shape[1]):
        total = total + weights[:, column : column + 1]
    return total


@by_token("gate")
def _sigmoid(gate: Tensor) -> Tensor:
    """float32, of [T, 1]."""
    return gate.float().sigmoid()


@op
def count_load(load: Tensor, experts: Tensor, slots: Tensor) -> None:
    """Add to `load`, int64 [E], how many tokens each expert gets; experts [T, K] are those of all
    ranks. slots: [T]; tokens of slot 0 are padding, and do not count."""
    live = (slots > 0).to(load.dtype)
    load.scatter_add_(0, experts.flatten().long(), live.repeat_interleave(experts.shape[1]))


@op
def run_experts(
    x: Tensor | Quantized,
    routes: Routes,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    shared: Shared | None = None,
) -> Tensor:
    """The weighted sum over each token's experts of down(silu(gate(x)) * up(x)), and `shared`.

    x: [T, H]; gate_up: of 2 * I outputs, gate first; down: of I inputs. Returns [T, H] in the dtype
    of the routes' weights, which is x's; the sum is float32, in the order of the experts, and
    rounded once. A fast path may quantize x to e4m3, as `fp8_linear`, where the weights are e4m3.
    """
    x = plain_rows(x, routes)
    total = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(len(gate_up.values)):
        inner = silu_mul(multiply(x, gate_up.of(expert, x.dtype)))
        out = multiply(inner, down.of(expert, x.dtype)).float()
        hit = routes.experts == expert
        weight = torch.where(hit, routes.weights.float(), 0.0).sum(-1, keepdim=True)
        total += torch.where(hit.any(-1, keepdim=True), out * weight, 0.0)
    return with_shared(total.to(x.dtype), shared)


def plain_rows(x: Tensor | Quantized, routes: Routes) -> Tensor:
    """x in the dtype of the routes' weights."""
    return x.dequantize().to(routes.weights.dtype) if isinstance(x, Quantized) else x


def with_shared(out: Tensor, shared: Shared | None) -> Tensor:
    """out + sigmoid(gate) * shared, in float32, rounded once. out: [T, H]."""
    if shared is None:
        return out
    added = _sigmoid(shared.gate) * shared.out.float()
    return (out.float() + added).to(out.dtype)
