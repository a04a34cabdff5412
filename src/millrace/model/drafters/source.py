"""Drafters that are checkpoints of their own: an EAGLE3 head, or a whole model.

It reads what a drafter is, says what memory it needs beside the target's, builds it and loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from millrace.config import EngineConfig
from millrace.errors import CheckpointError, ConfigError
from millrace.model.build import build_model
from millrace.model.build_context import BuildContext
from millrace.model.cache_spec import CacheSpec, attention_cache, hidden_vector
from millrace.model.causal_lm import CausalLM
from millrace.model.config import ModelConfig, read_config
from millrace.model.drafters import eagle3
from millrace.model.drafters.eagle3 import Eagle3Config, Eagle3Head
from millrace.model.parallel import TensorParallel
from millrace.model.weights import load, load_module, random_weights
from millrace.model_lookup import find_model


@dataclass(frozen=True, slots=True)
class DraftSource:
    """One drafter. eagle: None for a whole model, of this config."""

    directory: Path
    config: ModelConfig
    eagle: Eagle3Config | None

    @classmethod
    def of(cls, engine: EngineConfig, target: ModelConfig, directory: Path) -> DraftSource | None:
        """The drafter of an engine whose model is in `directory`; None where its drafts need none.

        Raises CheckpointError or ConfigError if it does not fit the target."""
        speculation = engine.speculation
        if speculation.head not in ("eagle3", "draft_model"):
            return None
        found = find_model(speculation.model, None, engine.args.download_dir)
        if speculation.head == "eagle3":
            eagle = eagle3.read_eagle3(found, target)
            return cls(found, eagle.config, eagle)
        config = read_config(found)
        _check_draft_model(found, config, directory, target)
        return cls(found, config, None)

    def extended(self, spec: CacheSpec) -> CacheSpec:
        """The target's memory, and the drafter's."""
        c, options = self.config, spec.options

        if self.eagle is not None:
            draft = attention_cache("draft", options, c.num_kv_heads, c.head_dim)
            return replace(spec, draft=draft, hidden=hidden_vector(options, c.hidden_size))
        layers = tuple(
            attention_cache(f"draft.{i}", options, c.num_kv_heads, c.head_dim)
            for i in range(c.num_layers)
        )
        return replace(spec, draft_model=layers)

    def attach(self, model: CausalLM, max_len: int, dtype: torch.dtype) -> None:
        """Build the drafter on the device of a target, without weights, and hand it over."""
        device = model.head.weight.device
        if self.eagle is None:
            model.draft_model = build_model(
                self.config, dtype=dtype, device=device, max_len=max_len, keep_quantized=None
            )
            model.draft_output = model.draft_model.head
            return
        build = BuildContext(self.config, TensorParallel(), dtype, device)
        head = Eagle3Head(build, self.eagle, max_len, model.embed).eval()
        model.mtp, model.draft_output = head, head.output

    def load(self, model: CausalLM, dummy: bool, seed: int, check: Callable[[], None]) -> None:
        """Fill the drafter of a model. dummy: with random numbers."""
        drafter = model.draft_model if self.eagle is None else model.mtp
        assert drafter is not None
        if dummy:
            random_weights(drafter, seed, check)
        elif isinstance(drafter, CausalLM):
            load(drafter, self.directory, check)
        else:
            load_module(drafter, eagle3.FAMILY, self.directory, check)


def _check_draft_model(
    directory: Path, config: ModelConfig, target_directory: Path, target: ModelConfig
) -> None:
    if config.num_gdn_layers:
        raise ConfigError(
            f"speculative_config.model {directory}: a draft model with recurrent layers is not yet "
            "served; use one with attention alone, or the method mtp"
        )
    if config.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"speculative_config.model {directory}: it has {config.vocab_size} tokens, and the "
            f"model has {target.vocab_size}; a draft model has the same tokenizer"
        )
    ours, theirs = (_vocabulary(place) for place in (directory, target_directory))
    if ours is not None and theirs is not None and ours != theirs:
        raise CheckpointError(
            f"speculative_config.model {directory}: its tokenizer has other tokens than the "
            "model's; a draft model has the same tokenizer"
        )


def _vocabulary(directory: Path) -> object:
    """Tokens and their ids; None where no file says them."""
    try:
        return json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"][
            "vocab"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
