"""The training model: Qwen3.5's hybrid decoder and its MTP head, written for packed rows.

Parameter names are the checkpoint's. Documents in a row do not affect each other: attention and the
short convolution are masked by document, and the recurrent state is reset at each start. Every MLP
is a plain one or a mixture of experts. This module knows nothing of data or optimisation. Sequences
are processed whole; generating is `generate.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 64
FORGET = -80.0  # log decay at a document's start: exp(-80) of an old state is nothing in fp32


@dataclass(frozen=True)
class Shape:
    """Sizes; the defaults are millrace-mini's.

    intermediate: of a plain MLP, or of each expert if there are `experts`, of which every token
    goes to `top_k` and to the shared one of width `shared`. interval: each such layer is attention.
    """

    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 512
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 256
    rotary: int = 64
    theta: float = 1e7
    key_heads: int = 2
    value_heads: int = 4
    gdn_dim: int = 128
    conv: int = 4
    eps: float = 1e-6
    interval: int = 4
    experts: int = 0
    top_k: int = 0
    shared: int = 0

    def is_attention(self, layer: int) -> bool:
        return layer % self.interval == self.interval - 1


SHAPES = {
    "millrace-mini": Shape(),
    "millrace-mini-moe": Shape(
        layers=6, interval=3, heads=2, kv_heads=1, intermediate=128, experts=8, top_k=2, shared=128
    ),
}


@dataclass
class Packing:
    """What the layers must know of a batch of rows.

    starts [B, L]: whether a document starts here. same [B, 1, L, L]: one document, causal.
    taps [B, 3, L]: whether the token 1, 2, 3 before this one is of the same document.
    real [B, L]: whether the token is of a document (of number 1 and up), not padding.
    """

    starts: Tensor
    same: Tensor
    taps: Tensor
    real: Tensor

    @classmethod
    def of(cls, documents: Tensor) -> Packing:
        length = documents.shape[1]
        before = [F.pad(documents, (n, 0), value=-1)[:, :length] for n in (1, 2, 3)]
        taps = torch.stack([documents == b for b in before], dim=1)
        causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
        same = (documents[:, :, None] == documents[:, None, :]) & causal
        return cls(~taps[:, 0], same[:, None], taps, documents > 0)


class Norm(nn.Module):
    """RMSNorm in fp32 whose weight is what it adds to one."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps)


class GatedNorm(nn.Module):
    """The GDN output norm: a plain weight, then times silu of the gate."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        return normed * F.silu(gate.float())


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


# --- Gated DeltaNet ------------------------------------------------------------------------------


class _UnitLowerInverse(torch.autograd.Function):
    """The inverse of I + A for strictly lower A; its gradient is two products with itself."""

    @staticmethod
    def forward(ctx, lower: Tensor) -> Tensor:
        eye = torch.eye(lower.shape[-1], device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower + eye, eye, upper=False, unitriangular=True)
        # LAPACK's come out by columns, of which a compiler's shape inference knows nothing.
        inverse = inverse.clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over whole rows, in chunks, from an empty state.

    q, k [B, H, L, K], v [B, H, L, V], log_decay, beta [B, H, L], all fp32; L a multiple of CHUNK.
    Within a chunk the updates are solved for at once; between chunks runs the recurrence
    S' = decay S + K^T (U - W S). Returns outputs [B, H, L, V] and the last state [B, H, K, V].
    """
    batch, heads, length, width = v.shape
    chunks = length // CHUNK
    q, k, v = (x.unflatten(2, (chunks, CHUNK)) for x in (q, k, v))
    g = log_decay.unflatten(2, (chunks, CHUNK)).cumsum(-1)
    beta = beta.unflatten(2, (chunks, CHUNK))[..., None]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    inverse = _UnitLowerInverse.apply(((beta * k) @ k.transpose(-1, -2) * decay).tril(-1))
    u = inverse @ (beta * v)
    w = inverse @ (beta * g[..., None].exp() * k)
    within = (q @ k.transpose(-1, -2)) * decay
    q = q * g[..., None].exp()
    last = g[..., -1:]
    k = k * (last - g)[..., None].exp()
    state = v.new_zeros(batch, heads, k.shape[-1], width)
    outputs = []
    for i in range(chunks):
        new = u[:, :, i] - w[:, :, i] @ state
        outputs.append(q[:, :, i] @ state + within[:, :, i] @ new)
        state = state * last[:, :, i, :, None].exp() + k[:, :, i].transpose(-1, -2) @ new
    return torch.cat(outputs, dim=2), state


class DeltaNet(nn.Module):
    """Projections, short causal convolution, gated delta rule, gated norm, projection."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        keys, values = s.key_heads * s.gdn_dim, s.value_heads * s.gdn_dim
        self.in_proj_qkv = linear(s.hidden, 2 * keys + values)
        self.in_proj_z = linear(s.hidden, values)
        self.in_proj_a = linear(s.hidden, s.value_heads)
        self.in_proj_b = linear(s.hidden, s.value_heads)
        self.conv1d = nn.Conv1d(
            2 * keys + values, 2 * keys + values, s.conv, groups=2 * keys + values, bias=False
        )
        self.A_log = nn.Parameter(torch.empty(s.value_heads).uniform_(0.01, 16).log())
        # A step of 0.001 to 0.1, as state-space models are started, so that memories are long.
        step = torch.empty(s.value_heads).uniform_(-6.9, -2.3).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm = GatedNorm(s.gdn_dim, s.eps)
        self.out_proj = linear(values, s.hidden)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log decay and beta, [B, L, H], in fp32."""
        rate = self.A_log.float().exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        return -rate, self.in_proj_b(x).float().sigmoid()

    def convolve(self, x: Tensor, taps: Tensor) -> Tensor:
        weight = self.conv1d.weight[:, 0].float()
        total = x.float() * weight[:, 3]
        for back in (1, 2, 3):
            earlier = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]].float()
            total = total + earlier * weight[:, 3 - back] * taps[:, back - 1, :, None]
        return F.silu(total)

    def split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, H, L, D] for all value heads; q and k of unit length, q scaled."""
        s, keys = self.s, self.s.key_heads * self.s.gdn_dim
        parts = mixed.split([keys, keys, s.value_heads * s.gdn_dim], dim=-1)
        q, k, v = (p.unflatten(-1, (-1, s.gdn_dim)).transpose(1, 2) for p in parts)
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        repeat = s.value_heads // s.key_heads
        q, k = (x.repeat_interleave(repeat, dim=1) for x in (q, k))
        return q * s.gdn_dim**-0.5, k, v

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        gate = self.in_proj_z(x).unflatten(-1, (-1, self.s.gdn_dim))
        return self.out_proj(self.norm(out, gate).flatten(-2).to(x.dtype))

    def forward(self, x: Tensor, packing: Packing) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Also the last state and the convolution's last inputs, to go on from."""
        inputs = self.in_proj_qkv(x)
        q, k, v = self.split(self.convolve(inputs, packing.taps))
        log_decay, beta = self.gates(x)
        log_decay = torch.where(packing.starts[..., None], FORGET, log_decay)
        with torch.autocast(x.device.type, enabled=False):
            out, state = delta_rule(q, k, v, log_decay.transpose(1, 2), beta.transpose(1, 2))
        return self.finish(out.transpose(1, 2), x), (state, inputs[:, -3:])


# --- attention -----------------------------------------------------------------------------------


def rotary(positions: Tensor, s: Shape) -> tuple[Tensor, Tensor]:
    inverse = s.theta ** (-torch.arange(0, s.rotary, 2, device=positions.device).float() / s.rotary)
    angles = positions.float()[..., None] * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., L, D]; the first dimensions turn, the rest pass."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    half = torch.cat((-turned[..., cos.shape[-1] // 2 :], turned[..., : cos.shape[-1] // 2]), -1)
    return torch.cat(((turned * cos + half * sin).to(x.dtype), rest), dim=-1)


class Attention(nn.Module):
    """Gated grouped-query attention with normed queries and keys."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = linear(s.hidden, 2 * s.heads * s.head_dim)
        self.k_proj = linear(s.hidden, s.kv_heads * s.head_dim)
        self.v_proj = linear(s.hidden, s.kv_heads * s.head_dim)
        self.o_proj = linear(s.heads * s.head_dim, s.hidden)
        self.q_norm = Norm(s.head_dim, s.eps)
        self.k_norm = Norm(s.head_dim, s.eps)

    def heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v [B, heads, L, D] with keys and values repeated, and the gate [B, L, heads*D]."""
        s = self.s
        q, gate = self.q_proj(x).unflatten(-1, (s.heads, 2, s.head_dim)).unbind(-2)
        k = self.k_proj(x).unflatten(-1, (s.kv_heads, s.head_dim))
        v = self.v_proj(x).unflatten(-1, (s.kv_heads, s.head_dim))
        cos, sin = rotary(positions, s)
        q = rotate(self.q_norm(q).to(v.dtype).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).to(v.dtype).transpose(1, 2), cos, sin)
        k, v = (y.repeat_interleave(s.heads // s.kv_heads, dim=1) for y in (k, v.transpose(1, 2)))
        return q, k, v, gate.flatten(-2)

    def finish(self, out: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj(out.transpose(1, 2).flatten(-2) * gate.sigmoid())

    def forward(self, x: Tensor, packing: Packing) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        positions = torch.arange(x.shape[1], device=x.device)
        q, k, v, gate = self.heads(x, positions)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.same)
        return self.finish(out, gate), (k, v)


# --- MLPs ----------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, width)
        self.up_proj = linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All experts of a layer in two tensors; of gate_up_proj the gate's rows come first."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.count = s.experts
        self.gate_up_proj = nn.Parameter(torch.empty(s.experts, 2 * s.intermediate, s.hidden))
        self.down_proj = nn.Parameter(torch.empty(s.experts, s.hidden, s.intermediate))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The sum of the experts' outputs times `weights` [..., E], which are 0 of most.

        Every expert sees every token, since two large GEMMs take a GPU less time than the grouping
        of tokens would: side by side, all experts are one wide MLP.
        """
        both = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (self.count, 2, -1))
        gate, up = both.unbind(-2)
        inner = F.silu(gate) * up * weights[..., None].to(gate.dtype)
        return F.linear(inner.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))


class Moe(nn.Module):
    """A router, experts, and a shared expert times the sigmoid of its gate."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.top_k = s.top_k
        self.gate = linear(s.hidden, s.experts)
        self.experts = Experts(s)
        self.shared_expert = Mlp(s.hidden, s.shared)
        self.shared_expert_gate = linear(s.hidden, 1)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs, and for each token and expert [..., E, 2] the probability, and the share of
        the token's choices."""
        probabilities = self.gate(x).float().softmax(-1)
        values, chosen = probabilities.topk(self.top_k, dim=-1)
        values = values / values.sum(-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(-1, chosen, values)
        shared = self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        picked = torch.zeros_like(probabilities).scatter(-1, chosen, 1 / self.top_k)
        return self.experts(x, weights) + shared, torch.stack((probabilities, picked), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x)[0]


def feed(mlp: Mlp | Moe, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The MLP's outputs, and its load [E, 2] over the real tokens; E is 0 of a plain MLP.

    Load: of each expert the mean of its probability, and its share of all choices.
    """
    if isinstance(mlp, Mlp):
        return mlp(x), x.new_zeros(0, 2)
    out, routing = mlp.routed(x)
    return out, (routing * real[..., None, None]).sum((0, 1)) / real.sum()


def imbalance(loads: list[Tensor]) -> Tensor:
    """1 if the experts of every layer have equal shares, else more: the auxiliary loss."""
    each = [len(load) * load.prod(-1).sum() for load in loads]
    return torch.stack(each).mean()


# --- the decoder ---------------------------------------------------------------------------------


class Layer(nn.Module):
    """A mixer (attention or GDN) and an MLP, each after a norm and added to the stream."""

    def __init__(self, s: Shape, attention: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(s.hidden, s.eps)
        self.post_attention_layernorm = Norm(s.hidden, s.eps)
        self.mlp = Moe(s) if s.experts else Mlp(s.hidden, s.intermediate)
        if attention:
            self.self_attn = Attention(s)
        else:
            self.linear_attn = DeltaNet(s)
        self.attention = attention

    @property
    def mixer(self) -> Attention | DeltaNet:
        return self.self_attn if self.attention else self.linear_attn

    def forward(self, x: Tensor, packing: Packing) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Also the mixer's cache and the MLP's load (see `feed`)."""
        mixed, cache = self.mixer(self.input_layernorm(x), packing)
        x = x + mixed
        out, load = feed(self.mlp, self.post_attention_layernorm(x), packing.real)
        return x + out, cache, load


class Decoder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(s, s.is_attention(i)) for i in range(s.layers))
        self.norm = Norm(s.hidden, s.eps)


# --- the MTP head --------------------------------------------------------------------------------


class Mtp(nn.Module):
    """Drafts: row j joins token j with the hidden state before it, and says token j+1.

    A further draft feeds the head's own output back as that hidden state. Its keys are then: of the
    first step up to where the drafts began, and one of each later step.
    """

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = Norm(s.hidden, s.eps)
        self.pre_fc_norm_hidden = Norm(s.hidden, s.eps)
        self.fc = linear(2 * s.hidden, s.hidden)
        self.layers = nn.ModuleList([Layer(s, attention=True)])
        self.norm = Norm(s.hidden, s.eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, packing: Packing, steps: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The normed output of each draft step at every row, teacher-forced, [B, L, hidden] each,
        and the MLP's loads.

        hidden: the model's own after its final norm, not shifted.
        """
        embedded = self.pre_fc_norm_embedding(embedded)
        same = packing.same & ~packing.starts[:, None, None, :]  # row 0 has no hidden before it
        past: list[tuple[Tensor, Tensor]] = []
        outputs, loads = [], []
        for _ in range(steps):
            hidden, keys, load = self._step(embedded, hidden, same, packing.real, past)
            past.append(keys)
            outputs.append(hidden)
            loads.append(load)
        return outputs, loads

    def _step(
        self,
        embedded: Tensor,
        hidden: Tensor,
        same: Tensor,
        real: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        layer = self.layers[0]
        before = self.pre_fc_norm_hidden(F.pad(hidden, (0, 0, 1, 0))[:, :-1])
        x = self.fc(torch.cat((embedded, before), dim=-1)).float()
        attention = layer.self_attn
        positions = torch.arange(x.shape[1], device=x.device)
        q, k, v, gate = attention.heads(layer.input_layernorm(x), positions)
        if past:
            out = _draft_attention(q, [*past, (k, v)], same)
        else:
            # A row without any key (the first of a document) gives zeros, and nothing learns there.
            eye = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=same | eye)
        x = x + attention.finish(out, gate)
        fed, load = feed(layer.mlp, layer.post_attention_layernorm(x), real)
        return self.norm(x + fed), (k, v), load


def _back(x: Tensor, by: int) -> Tensor:
    """Row p of the result is row p - by of x."""
    return F.pad(x, (0, 0, by, 0))[:, :, : x.shape[2]] if by else x


def _draft_attention(q: Tensor, steps: list[tuple[Tensor, Tensor]], same: Tensor) -> Tensor:
    """Attention of draft step s = len(steps) at every row p.

    Its keys: those of step 1 at rows up to p - s + 1, and of step i (2..s) at row p - s + i.
    """
    s, scale = len(steps), q.shape[-1] ** -0.5
    keys, values = steps[0]
    allowed = same & torch.ones(same.shape[-2:], dtype=torch.bool, device=q.device).tril(1 - s)
    scores = (q @ keys.transpose(-1, -2)).float() * scale
    scores = scores.masked_fill(~allowed, -torch.inf)
    own = [_back(k, s - i) for i, (k, _) in enumerate(steps[1:], start=2)]
    extra = torch.stack([(q * k).float().sum(-1) * scale for k in own], dim=-1)
    weights = torch.cat((scores, extra), dim=-1).softmax(-1).to(q.dtype)
    out = weights[..., : keys.shape[2]] @ values
    for i, (_, v) in enumerate(steps[1:], start=2):
        column = keys.shape[2] + i - 2
        out = out + weights[..., column : column + 1] * _back(v, s - i)
    return out


class Mini(nn.Module):
    """The whole: decoder, tied head, MTP head."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape or Shape()
        self.model = Decoder(self.shape)
        self.mtp = Mtp(self.shape)

    def hidden(
        self, ids: Tensor, packing: Packing
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[Tensor]]:
        """The states after the final norm, in fp32, each layer's cache, and each MLP's load."""
        x = self.model.embed_tokens(ids)
        caches, loads = [], []
        for layer in self.model.layers:
            x, cache, load = layer(x, packing)
            caches.append(cache)
            loads.append(load)
        return self.model.norm(x), caches, loads

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)

    def drafts(
        self, ids: Tensor, hidden: Tensor, packing: Packing, steps: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Each step's outputs, and each step's load."""
        return self.mtp(self.model.embed_tokens(ids), hidden, packing, steps)
