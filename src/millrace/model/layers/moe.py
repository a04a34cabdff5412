"""A mixture of experts in place of an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from millrace.kernels.batch import Batch
from millrace.kernels.moe import (
    ExpertWeights,
    Routes,
    Shared,
    count_load,
    route,
    run_experts,
)
from millrace.kernels.quantize import quantize
from millrace.model.build_context import BuildContext
from millrace.model.layers.linear import block_of, linear
from millrace.model.layers.mlp import MLP
from millrace.model.layers.norm import NormedInput, ReadsNormed
from millrace.model.parallel import TILE, TensorParallel
from millrace.model.parameter import Piece, StoredPart, full_tensor, parameter
from millrace.model.weight_format import HasGemms, Stack

ROUTER_ROWS = 8  # a router has a multiple of them, which GEMMs want


class MoE(nn.Module):
    """A router, experts, and a shared expert with a gate if the model has one.

    Every rank routes every token, and has a share of the width of each expert, or some experts in
    full. Its result is the part that its experts add. A GPU may have the shared expert behind the
    others, as one that every token goes to (`joins_shared`). load: int64 [E], how many tokens each
    expert has got; None: they are not counted.
    """

    load: Tensor | None = None

    def __init__(self, build: BuildContext, prefix: str) -> None:
        super().__init__()
        assert build.config.experts is not None
        self.layer = prefix.removesuffix(".mlp").removeprefix("model.")
        c, hidden = build.config.experts, build.config.hidden_size
        self.top_k, self.normalize = c.top_k, c.normalize
        self.count, self.joined = c.count, joins_shared(build, prefix)
        router = [full_tensor(f"{prefix}.gate.weight", c.count, hidden)]
        gate = full_tensor(f"{prefix}.shared_expert_gate.weight", 1, hidden)
        shared = f"{prefix}.shared_expert"
        if self.joined:
            router.append(replace(gate, pad_rows=ROUTER_ROWS - 1))
        self.router = linear(build, router, quantized=False)
        self.experts = Experts(build, f"{prefix}.experts", [shared] if self.joined else [])
        self.shared: SharedExpert | None = None
        if c.shared_width and not self.joined:
            self.shared = SharedExpert(build, shared, c.shared_width)
            self.shared_gate = linear(build, [gate], quantized=False)

    @property
    def inputs(self) -> list[ReadsNormed]:
        """The router, the experts and the linear layers of the shared one."""
        shared = [] if self.shared is None else [*self.shared.inputs, self.shared_gate]
        return [self.router, self.experts, *shared]

    def forward(self, x: NormedInput, batch: Batch) -> Tensor:
        """x: [T, H]; returns [T, H], this rank's partial sum."""
        plain = x.for_linear(self.router)
        assert isinstance(plain, Tensor)
        routes = self._routes(self.router(plain))
        if self.load is not None:
            count_load(self.load, routes.experts[:, : self.top_k], batch.token_slots)
        routes = self.experts.local(routes)
        shared = None
        if self.shared is not None:
            shared = Shared(self.shared(x, batch), self.shared_gate(plain))
        rows = x.for_linear(self.experts)
        return run_experts(rows, routes, self.experts.gate_up, self.experts.down, shared)

    def _routes(self, logits: Tensor) -> Routes:
        if not self.joined:
            return route(logits, self.top_k, self.normalize)
        gate = logits[:, self.count : self.count + 1]
        return route(logits[:, : self.count], self.top_k, self.normalize, gate)


def joins_shared(build: BuildContext, prefix: str) -> bool:
    """Whether the shared expert is the last of the experts: four kernels less to a layer of a GPU.

    It must be as wide as they are, in the same format, and cut like them.
    """
    c, format_of = build.config.experts, build.config.quantization.format_of
    assert c is not None
    equal = c.shared_width == c.width and all(
        format_of(f"{prefix}.experts.0.{part}_proj")
        == format_of(f"{prefix}.shared_expert.{part}_proj")
        for part in ("gate", "up", "down")
    )
    return equal and build.device.type == "cuda" and not build.tp.whole_experts


class SharedExpert(MLP):
    """The expert that every token goes to, cut by width as other MLPs.

    Where ranks have whole experts and the width cannot be cut between blocks, every rank has all of
    it, and runs it for its share of the tokens.
    """

    def __init__(self, build: BuildContext, prefix: str, width: int) -> None:
        names = [f"{prefix}.{part}_proj" for part in ("gate", "up", "down")]
        unit, ranks = max(block_of(build, names), TILE), build.tp
        self.replicated = ranks.whole_experts and width % (unit * ranks.size) != 0
        one = replace(build, tp=TensorParallel()) if self.replicated else build
        super().__init__(one, prefix, width)
        self.ranks = ranks

    def forward(self, x: NormedInput, batch: Batch) -> Tensor:
        """As MLP; where it is replicated, zeros at the tokens of other ranks."""
        if not self.replicated:
            return super().forward(x, batch)
        assert x.plain is not None
        start, stop = self.ranks.uneven_share(len(x.plain))
        out = torch.zeros_like(x.plain)
        if start < stop:
            rows = x.plain[start:stop]
            quantized = quantize(rows) if self.gate_up_proj.takes_fp8 else None
            out[start:stop] = super().forward(NormedInput(rows, quantized), batch)
        return out


class Experts(HasGemms):
    """The weights of experts: this rank's share of the width of each, or its share of them.

    They are named expert by expert. Checkpoints that have them in one tensor look the same here
    (`unfused`). others: prefixes of further ones, behind them.
    """

    gate_up_values: nn.Parameter
    gate_up_scales: nn.Parameter | None
    down_values: nn.Parameter

    def __init__(self, build: BuildContext, prefix: str, others: Sequence[str] = ()) -> None:
        super().__init__()
        c, hidden = build.config.experts, build.config.hidden_size
        assert c is not None
        self.first, stop, share = 0, c.count, (0, c.width)
        if build.tp.whole_experts:
            self.first, stop = build.tp.share(c.count)
        else:
            share = build.tp.share(c.width)
        into, out = (c.width, hidden), (hidden, c.width)
        names = [*(f"{prefix}.{expert}" for expert in range(self.first, stop)), *others]
        gate_up = [
            Piece(f"{name}.{part}_proj.weight", into, (share,))
            for name in names
            for part in ("gate", "up")
        ]
        down = [Piece(f"{name}.down_proj.weight", out, ((0, hidden),), share) for name in names]
        self.top_k, self.dtype = c.top_k + len(others), build.dtype
        self.count, self.all_here = len(names), len(names) >= c.count
        self.packing: dict[str, tuple[int, bool]] = {}  # group and floats of ExpertWeights
        for name, pieces in (("gate_up", gate_up), ("down", down)):
            stack = _stacked(build, pieces)
            for part in ExpertWeights._fields[:4]:
                self.register_parameter(f"{name}_{part}", getattr(stack, part))
            self.packing[name] = stack.group, stack.floats

    def local(self, routes: Routes) -> Routes:
        """The routes by the numbers that experts have on this rank; -1: it is on another."""
        if self.all_here:
            return routes
        mine = routes.experts - self.first
        here = (mine >= 0) & (mine < self.count)
        return Routes(torch.where(here, mine, -1), routes.weights)

    @property
    def gemm_shape(self) -> tuple[int, ...]:
        """Experts, hidden channels, and channels of an expert, on this rank."""
        return self.down.shape

    def multiply(self, tokens: int) -> None:
        count, hidden, _ = self.gemm_shape
        device = self.down_values.device
        experts = torch.arange(tokens * self.top_k, dtype=torch.int32, device=device) % count
        weights = torch.ones(tokens, self.top_k, dtype=self.dtype, device=device)
        x = torch.zeros(tokens, hidden, dtype=self.dtype, device=device)
        routes = Routes(experts.view(tokens, self.top_k), weights)
        run_experts(x, routes, self.gate_up, self.down)

    @property
    def takes_fp8(self) -> bool:
        """Whether inputs are best quantized to e4m3 before: on a CPU they are multiplied as they
        are."""
        on_cpu = self.gate_up_values.device.type == "cpu"
        return self.gate_up_scales is not None and not self.is_w4 and not on_cpu

    @property
    def is_w4(self) -> bool:
        """Whether the weights stay 4 bits."""
        return self.gate_up.factor is not None

    @property
    def gate_up(self) -> ExpertWeights:
        return self._by_expert("gate_up")

    @property
    def down(self) -> ExpertWeights:
        return self._by_expert("down")

    def _by_expert(self, which: str) -> ExpertWeights:
        parts = (getattr(self, f"{which}_{name}") for name in ExpertWeights._fields[:4])
        views = [x if x is None else x.view(self.count, -1, x.shape[1]) for x in parts]
        values, scales, factor, zeros = views
        assert values is not None
        group, floats = self.packing[which]
        return ExpertWeights(values, scales, factor, zeros, group, floats)


def count_loads(model: nn.Module) -> dict[str, Tensor]:
    """Begin to count the tokens that each expert gets: the counts by layer, `MoE.load`."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        device = layer.experts.gate_up_values.device
        layer.load = torch.zeros(layer.count, dtype=torch.int64, device=device)
    return {layer.layer: layer.load for layer in layers if layer.load is not None}


def _stacked(build: BuildContext, pieces: list[Piece]) -> Stack:
    """The weights of all pieces, one behind the other, and their scales if they stay quantized."""
    forms = [build.config.quantization.format_of(piece.module) for piece in pieces]
    if build.keeps_experts(forms[0]) and len(set(forms)) == 1:
        kept = forms[0].stack(build, pieces)
        if kept is not None:
            return kept
    read_by = zip(pieces, forms, strict=True)
    plain = [replace(piece, reader=form) for piece, form in read_by]
    return Stack(parameter(plain, build.dtype, build.device))


def unfused(name: str, shape: tuple[int, ...]) -> list[StoredPart] | None:
    """What a tensor of all experts is made of, by the names that `Experts` has; None for others.

    `experts.gate_up_proj` [E, 2 * I, H], gate first, `experts.down_proj` [E, H, I], and scales of
    blocks, whose names have `_scale_inv` behind.
    """
    stem, _, last = name.rpartition(".")
    kind = last.removesuffix("_scale_inv")
    if (
        not stem.endswith(".experts")
        or kind not in ("gate_up_proj", "down_proj")
        or len(shape) != 3
    ):
        return None
    suffix, half = ".weight" + last.removeprefix(kind), shape[1] // 2
    parts: list[tuple[str, tuple[int, int]]] = [("down_proj", (0, shape[1]))]
    if kind == "gate_up_proj":
        parts = [("gate_proj", (0, half)), ("up_proj", (half, shape[1]))]
    return [
        StoredPart(f"{stem}.{expert}.{part}{suffix}", expert, rows)
        for expert in range(shape[0])
        for part, rows in parts
    ]
