"""EAGLE3: one layer that reads the token and the hidden vectors of three layers of the target.

Its attention reads two vectors: the normed embedding, and the normed fusion of the three, or of its
own output for the draft before. Its vocabulary is a part of the target's. Names are those of the
published drafters for vLLM and SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.errors import CheckpointError
from millrace.kernels.batch import Batch, Caches
from millrace.kernels.gemm import linear as multiply_with
from millrace.model.build_context import BuildContext
from millrace.model.causal_lm import CausalLM, DraftHead
from millrace.model.config import ModelConfig
from millrace.model.config_file import read_files
from millrace.model.family import Family
from millrace.model.layers.attention import Attention, Rope
from millrace.model.layers.linear import linear
from millrace.model.layers.mlp import MLP
from millrace.model.layers.norm import Norm, NormedInput
from millrace.model.parallel import TensorParallel
from millrace.model.parameter import Stored, full_tensor, parameter
from millrace.model.registry import quantization_of
from millrace.model.vocabulary import OutputHead, VocabTable
from millrace.model.weights import tensor_names

ARCHITECTURES = (
    "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM",
    "Eagle3Speculator", "Eagle3DraftModel",
)  # fmt: skip
DEFAULT_THETA = 10_000.0  # of Llama's configuration
PARTS = 3  # layers of the target that are read


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """config: of the layer. target_hidden: of the target's hidden vectors. taps: the target's
    streams that are read: the one before layer i, for each i. vocab_size: of the drafter.
    residual_normed: the residual stream is the normed fusion. output_normed: the next draft takes
    the output behind the last norm. tensors: names that the checkpoint has; None: nobody knows."""

    config: ModelConfig
    target_hidden: int
    taps: tuple[int, ...]
    vocab_size: int
    residual_normed: bool
    output_normed: bool
    qk_norm: bool
    tensors: frozenset[str] | None

    def has(self, name: str) -> bool:
        return self.tensors is not None and name in self.tensors


def flat_name(name: str) -> str | None:
    """Some files have a prefix, and some call the layer `layers.0`."""
    name = name.removeprefix("model.")
    if name == "t2d" or name.endswith("rotary_emb.inv_freq"):
        return None
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def read_eagle3(directory: Path, target: ModelConfig) -> Eagle3Config:
    """The drafter in `directory`, for a target. Raises CheckpointError where they do not fit."""
    file = read_files(directory, {})
    inner = file.outer.get("transformer_layer_config") or {}
    entries = {**file.outer, **inner}
    if entries.get("rope_theta") is None:
        entries["rope_theta"] = DEFAULT_THETA
    _check_architecture(directory, file.architectures)
    file = replace(file, text=entries, quantization=quantization_of(None))
    file.only("attention_bias", False)
    file.only("num_hidden_layers", 1)
    file.only("hidden_act", "silu")
    config = replace(file.decoder(), family=FAMILY.name, tied=False)
    hidden = entries.get("target_hidden_size") or config.hidden_size
    _check_target(directory, "hidden vectors of", hidden, target.hidden_size)
    _check_target(directory, "a vocabulary of", config.vocab_size, target.vocab_size)
    names = (flat_name(name) for name in tensor_names(directory))
    tensors = frozenset(name for name in names if name is not None) or None
    return Eagle3Config(
        config,
        target_hidden=hidden,
        taps=_taps(entries, target.num_layers),
        vocab_size=entries.get("draft_vocab_size") or config.vocab_size,
        residual_normed=bool(entries.get("norm_before_residual", bool(inner))),
        output_normed=bool(entries.get("norm_output", False)),
        qk_norm=bool(tensors and "midlayer.self_attn.q_norm.weight" in tensors),
        tensors=tensors,
    )


def _check_architecture(directory: Path, names: list[str]) -> None:
    if names and not set(names) & set(ARCHITECTURES):
        raise CheckpointError(
            f"{directory}: {', '.join(names)} is no EAGLE3 drafter; known are "
            f"{', '.join(ARCHITECTURES)}; whole models draft by the method draft_model"
        )


def _check_target(directory: Path, what: str, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise CheckpointError(
            f"{directory}: it drafts for a model with {what} {ours}, and this one has {theirs}"
        )


def _taps(entries: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Layers before which the stream is read. In `eagle_config`, those behind which it is read."""
    found = entries.get("eagle_aux_hidden_state_layer_ids")
    inner = (entries.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not found and inner:
        found = [layer + 1 for layer in inner]
    taps = tuple(found or (2, layers // 2, layers - 3))
    if len(taps) != PARTS or not all(0 <= tap < layers for tap in taps):
        raise CheckpointError(
            f"eagle_aux_hidden_state_layer_ids {list(taps)}: {PARTS} of the target's {layers} "
            "layers are read"
        )
    return taps


class DraftVocabulary(OutputHead):
    """An output head over a part of the target's tokens; the others have a logit of -inf."""

    def __init__(self, build: BuildContext, rows: int, vocab_size: int) -> None:
        super().__init__(TensorParallel(), vocab_size, vocab_size)
        piece = full_tensor("lm_head.weight", rows, build.config.hidden_size)
        self.weight = parameter([piece], build.dtype, build.device)
        # Token i of the drafter is token i + offset of the target.
        whole = full_tensor("d2t", rows)
        whole = replace(whole, reader=Stored(frozenset({"I64"})), random=_zeros)
        self.offsets = None
        if rows < vocab_size:
            self.offsets = parameter([whole], torch.int64, build.device)

    def padded_logits(self, hidden: Tensor) -> Tensor:
        found = multiply_with(hidden, self.weight)
        if self.offsets is None:
            return found
        ids = torch.arange(self.offsets.shape[0], device=found.device) + self.offsets
        whole = found.new_full((found.shape[0], self.vocab_size), -torch.inf)
        return whole.index_copy_(1, ids, found)


def _zeros(data: Tensor, generator: torch.Generator) -> None:
    data.zero_()


class Eagle3Head(DraftHead):
    """embed: the target's embedding, where the drafter has none of its own."""

    def __init__(
        self,
        build: BuildContext,
        options: Eagle3Config,
        max_len: int,
        embed: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        hidden, target = build.config.hidden_size, options.target_hidden
        self.taps, self.fused_width = options.taps, hidden
        self._target, self._residual_normed = target, options.residual_normed
        self._output_normed = options.output_normed
        self.table = None
        self._embed = embed
        if options.has("embed_tokens.weight"):
            self.table = VocabTable(build, "embed_tokens.weight")
            self._embed = self.table.embed
        norms = {"input_norm": PARTS * target, "fc_norm": hidden}
        self.fusing_norms = torch.nn.ModuleDict(
            {
                name: Norm(build, f"{name}.weight", size)
                for name, size in norms.items()
                if options.has(f"{name}.weight")
            }
        )
        self.fc = linear(build, [full_tensor("fc.weight", hidden, PARTS * target)])
        self.embedding_norm = Norm(build, "midlayer.input_layernorm.weight", hidden)
        self.hidden_norm = Norm(build, "midlayer.hidden_norm.weight", hidden)
        self.attention = Attention(
            build, "midlayer.self_attn", Rope(build, max_len), qk_norm=options.qk_norm, first=1,
            inputs=2 * hidden,
        )  # fmt: skip
        self.mlp_norm = Norm(build, "midlayer.post_attention_layernorm.weight", hidden)
        self.mlp = MLP(build, "midlayer.mlp")
        self.norm = Norm(build, "norm.weight", hidden)
        self.output = DraftVocabulary(build, options.vocab_size, build.config.vocab_size)

    def fuse(self, streams: Sequence[Tensor]) -> Tensor:
        x = torch.cat(list(streams), dim=-1)
        if "input_norm" in self.fusing_norms:
            x = self.fusing_norms["input_norm"](x)
        fused: Tensor = self.fc(x)
        if "fc_norm" in self.fusing_norms:
            fused = self.fusing_norms["fc_norm"](fused)
        return fused

    def features(self, hidden: Tensor) -> Tensor:
        return hidden[:, self._target :]

    def normed(self, feature: Tensor) -> Tensor:
        return feature if self._output_normed else self.norm(feature)

    def forward(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        return self._rest(self._input(ids, hidden), batch, caches)

    def write_kv(self, ids: Tensor, hidden: Tensor, batch: Batch, caches: Caches) -> Tensor:
        assert caches.mtp is not None, "the drafter needs its own KV cache"
        x = self._input(ids, hidden)
        self.attention.write_kv(self._pair(x), batch, caches.mtp)
        return x

    def draft_hidden(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        return self._rest(x, batch, caches)

    def multiply(self, tokens: int) -> None:
        self.attention.qkv_proj.multiply(tokens, self.attention.queries_and_gates)

    def _input(self, ids: Tensor, features: Tensor) -> Tensor:
        """[T, 3 H]: what attention reads, then the residual stream."""
        normed = self.hidden_norm(features.contiguous())
        embedded = self.embedding_norm(self._embed(ids))
        residual = normed if self._residual_normed else features
        return torch.cat([embedded, normed, residual], dim=-1)

    def _pair(self, x: Tensor) -> NormedInput:
        return NormedInput(x[:, : -self.fused_width].contiguous(), None)

    def _rest(self, x: Tensor, batch: Batch, caches: Caches) -> Tensor:
        assert caches.mtp is not None, "the drafter needs its own KV cache"
        residual = x[:, -self.fused_width :].contiguous()
        mixed = self.attention(self._pair(x), batch, caches.mtp, caches)
        normed, stream = self.mlp_norm.add_for(self.mlp.inputs, mixed, residual)
        out, feature = self.norm.add(self.mlp(normed, batch), stream)
        return out if self._output_normed else feature


def _not_by_itself(*_: Any) -> CausalLM:
    raise CheckpointError("an EAGLE3 drafter is no model by itself; name it in speculative_config")


FAMILY = Family(
    name="EAGLE3",
    model_types=(),
    architectures=ARCHITECTURES,
    read=lambda file: file.decoder(),
    build=_not_by_itself,
    flat_name=flat_name,
)
