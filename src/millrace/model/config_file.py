"""What config.json and generation_config.json say of a checkpoint, and their errors.

It knows the entries that families have in common. An entry that asks for what is not implemented is
refused by name; so families say by `only` which values they compute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from millrace.errors import CheckpointError
from millrace.kernels.formats import YarnScaling
from millrace.model.config import ExpertsConfig, LayerType, ModelConfig
from millrace.model.weight_format import Quantization

FULL_ATTENTION: LayerType = "full_attention"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What the files of a checkpoint say.

    path: of config.json, for messages. outer: its entries. text: those of the text model, which
    are the same unless the checkpoint is nested. generation: of generation_config.json.
    quantization: what `quantization_config` says; None until it has been read.
    """

    path: Path
    outer: dict[str, Any]
    text: dict[str, Any]
    generation: dict[str, Any]
    nested: bool
    quantization: Quantization | None = None

    @property
    def model_type(self) -> str | None:
        return self.outer.get("model_type")

    @property
    def architectures(self) -> list[str]:
        found = self.outer.get("architectures") or []
        return [str(name) for name in (found if isinstance(found, list) else [found])]

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        return self.outer.get("quantization_config") or self.text.get("quantization_config")

    # --- entries, for families ------------------------------------------------------------------

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number greater than 0."""
        value = self.text.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.path}: {name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.path}: {name} must be a whole number > 0, got {value!r}")
        return value

    def only(self, name: str, *allowed: object) -> None:
        """Refuse the checkpoint if an entry is there with another value than these."""
        value = self.text.get(name, allowed[0])
        if value not in allowed:
            can = " and ".join(map(repr, allowed))
            raise CheckpointError(f"{name} {value!r} cannot be run; only {can} can")

    def layer_types(self, *kinds: LayerType, interval: int = 1) -> tuple[LayerType, ...]:
        """A kind for each decoder layer, of those that the family has.

        interval: where the file lists none, every so many-th layer is full attention, the others
        are of the first kind.
        """
        count = self.size("num_hidden_layers")
        listed = self.text.get("layer_types")
        if listed is None:
            listed = [kinds[0] if (i + 1) % interval else FULL_ATTENTION for i in range(count)]
        unknown = sorted({str(kind) for kind in listed} - set(kinds))
        if unknown or len(listed) != count:
            raise CheckpointError(
                f"{self.path}: layer_types must name {' or '.join(reversed(kinds))} for each of "
                f"{count} layers, got {len(listed)} entries"
                + (f" with {unknown}" if unknown else "")
            )
        return tuple(listed)

    def experts(self) -> ExpertsConfig:
        """A mixture of experts in every layer, without a shared expert, normalized."""
        count, top_k = self.size("num_experts"), self.size("num_experts_per_tok")
        if top_k > count:
            raise CheckpointError(
                f"{self.path}: num_experts_per_tok must be at most num_experts {count}, got {top_k}"
            )
        return ExpertsConfig(count, top_k, self.size("moe_intermediate_size"), normalize=True)

    def decoder(
        self, *, head_dim: int | None = None, rotary_share: float = 1.0, mlp: bool = True
    ) -> ModelConfig:
        """What decoders have in common: all layers full attention, without a draft head.

        head_dim: where the file has none; None: hidden_size / heads. rotary_share: likewise, of a
        head's dimensions. mlp: whether layers have plain MLPs. A family changes what it does
        otherwise by `dataclasses.replace`.
        """
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        dim = self.size("head_dim", head_dim or hidden // heads)
        rotary_dim, theta, scaling = self._rope(dim, rotary_share)
        assert self.quantization is not None
        return ModelConfig(
            family="",
            hidden_size=hidden,
            intermediate_size=self.size("intermediate_size") if mlp else 0,
            layer_types=(FULL_ATTENTION,) * self.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=self.size("num_key_value_heads", heads),
            head_dim=dim,
            rotary_dim=rotary_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            vocab_size=self.size("vocab_size"),
            tied=self._tied(),
            eps=float(self.text.get("rms_norm_eps", 1e-6)),
            max_positions=self.size("max_position_embeddings", 32768),
            eos_ids=self._eos_ids(),
            dtype=self._dtype(),
            quantization=self.quantization,
            nested=self.nested,
        )

    def _tied(self) -> bool:
        text = self.text.get("tie_word_embeddings", False)
        return bool(self.outer.get("tie_word_embeddings", text))

    def _eos_ids(self) -> tuple[int, ...]:
        """Of generation_config.json if it has some, else of config.json."""
        for source in (self.generation, self.outer, self.text):
            found = source.get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (int(found),)
        return ()

    def _dtype(self) -> Literal["float32", "bfloat16"]:
        """The checkpoint's dtype; float16 checkpoints run in bfloat16."""
        for source in (self.text, self.outer):
            name = source.get("dtype") or source.get("torch_dtype")
            if name is not None:
                return "float32" if name == "float32" else "bfloat16"
        return "bfloat16"

    # --- rotary embedding -----------------------------------------------------------------------

    def _rope(self, head_dim: int, share: float) -> tuple[int, float, YarnScaling | None]:
        """(rotary_dim, theta, scaling) from rope_parameters, or from older top-level entries."""
        entries = self.text
        rope = {**(entries.get("rope_scaling") or {}), **(entries.get("rope_parameters") or {})}
        theta = rope.get("rope_theta", entries.get("rope_theta"))
        if theta is None:
            raise CheckpointError(f"{self.path}: rope_parameters.rope_theta is missing")
        share = rope.get("partial_rotary_factor", entries.get("partial_rotary_factor", share))
        rotary_dim = int(head_dim * share)
        if rotary_dim < 2 or rotary_dim % 2:
            raise CheckpointError(
                f"{self.path}: partial_rotary_factor {share} turns {rotary_dim} dimensions of a "
                "head; an even number of at least 2 is needed"
            )
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise CheckpointError(f"rope_type {kind!r} cannot be run; default and yarn can")
        return rotary_dim, float(theta), self._yarn(rope) if kind == "yarn" else None

    def _yarn(self, rope: dict[str, Any]) -> YarnScaling:
        original = rope.get("original_max_position_embeddings")
        if original is None:
            raise CheckpointError(
                f"{self.path}: rope_type yarn needs original_max_position_embeddings"
            )
        factor = rope.get("factor") or self.size("max_position_embeddings", 32768) / original
        magnitude = rope.get("attention_factor")
        if magnitude is None:
            numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
            magnitude = _yarn_magnitude(factor)
            if numerator and denominator:
                magnitude = _yarn_magnitude(factor, numerator) / _yarn_magnitude(
                    factor, denominator
                )
        return YarnScaling(
            factor=float(factor),
            original_max_positions=int(original),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            magnitude=float(magnitude),
            truncate=bool(rope.get("truncate", True)),
        )


def _yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


# --- files --------------------------------------------------------------------------------------


def read_files(directory: Path, overrides: Mapping[str, Any]) -> ConfigFile:
    """The files of a checkpoint; overrides: as in `config.read_config`. Raises CheckpointError."""
    path, generation = directory / "config.json", directory / "generation_config.json"
    found = _read_json(path)
    outer = _overridden(found, overrides)
    nested = isinstance(found.get("text_config"), dict)
    text = _overridden({**outer, **outer["text_config"]}, overrides) if nested else outer
    return ConfigFile(
        path, outer, text, _read_json(generation) if generation.exists() else {}, nested
    )


def _overridden(entries: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(entries)
    for name, value in overrides.items():
        old = found.get(name)
        objects = isinstance(old, dict) and isinstance(value, dict)
        found[name] = _overridden(old or {}, value) if objects else value
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a directory; give one with a config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give a Hugging Face model directory") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content
