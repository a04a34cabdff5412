"""The facts of a model on which the search space depends, from its config.json.

The model may lie elsewhere, with a server that is only addressed; then the planner's catalogue is
asked, and what neither knows stays unknown. No weights and no torch are touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from millrace.errors import CheckpointError
from millrace.model_lookup import find_model
from millrace.plan.facts.models import catalogue

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")


class ModelFacts(msgspec.Struct, frozen=True):
    """positions: the longest sequence that it knows, 0 where that is not known. experts: whether
    it is a mixture of them."""

    positions: int = 0
    experts: bool = False


def model_facts(name: str) -> ModelFacts:
    """What is known of a model, a directory or a name. Nothing is no error."""
    entries = _entries(name)
    text = {**entries, **_object(entries.get("text_config"))}
    positions = text.get("max_position_embeddings")
    return ModelFacts(
        positions=positions if isinstance(positions, int) else 0,
        experts=any(int(text.get(key) or 0) > 1 for key in _EXPERTS),
    )


def _entries(name: str) -> Mapping[str, Any]:
    try:
        content = (find_model(name) / "config.json").read_bytes()
        return _object(msgspec.json.decode(content))
    except (CheckpointError, OSError, msgspec.DecodeError):
        short = name.lower().rsplit("/", 1)[-1].removesuffix("-fp8")
        return catalogue().get(short, {})


def _object(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}
