"""Muon for the matrices inside the layers, AdamW for everything else.

Muon makes each update orthogonal (five Newton-Schulz iterations of its momentum); matrices of one
shape are processed as one batch, and a tensor of experts is a batch of matrices. It knows
parameters and gradients, not the model.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MIN_SIDE = 64  # thinner matrices (one row a head) are left to AdamW


def orthogonalise(matrices: Tensor) -> Tensor:
    """[..., R, C] to matrices of the same singular vectors whose singular values are near one."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps of RMS 0.2 lr, the size of AdamW's, so that both can share a schedule."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for same in shapes.values():
                self._step_alike(same, group)

    def _step_alike(self, params: list[nn.Parameter], group: dict[str, float]) -> None:
        grads = [p.grad for p in params]
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
        update = orthogonalise(torch.stack(ahead))
        scale = 0.2 * max(params[0].shape[-2:]) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["decay"])
        updates = (update.float() * (-group["lr"] * scale)).unbind()
        torch._foreach_add_(params, list(updates))


def make_optimizers(module: nn.Module, lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over the module's trainable parameters; the embedding is AdamW's."""
    matrices, rest = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            wide = p.ndim >= 2 and min(p.shape[-2:]) >= MIN_SIDE and "embed" not in name
            (matrices if wide else rest).append(p)
    fused = rest[0].is_cuda
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    return [Muon(matrices, lr, 0.95, decay), adam]
