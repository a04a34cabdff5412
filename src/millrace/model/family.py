"""What a family of models is: how its config.json is read, and how its model is built.

Each family is a module in `families/` with one `Family`, its `FAMILY`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from millrace.model.build_context import BuildContext
from millrace.model.causal_lm import CausalLM
from millrace.model.config import ModelConfig
from millrace.model.config_file import ConfigFile
from millrace.model.parameter import StoredPart


def _same(name: str) -> str | None:
    return name


def _whole(name: str, shape: tuple[int, ...]) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    name: for messages. model_types, architectures: the entries of config.json that it serves.
    read: the configuration, or CheckpointError for options that are not implemented. build: the
    model with empty weights, `build(context, max_len, mtp)`; max_len: positions of its rotary
    tables; mtp: whether with its draft head. flat_name: the name by which pieces know a tensor of
    a checkpoint; None for tensors that are not used. parts: the weights that a tensor of this flat
    name and shape consists of, if pieces name them one by one; None: it is one weight. optional:
    the first parts of the names of tensors that a checkpoint may have and a model does without.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    read: Callable[[ConfigFile], ModelConfig]
    build: Callable[[BuildContext, int, bool], CausalLM]
    flat_name: Callable[[str], str | None] = _same
    parts: Callable[[str, tuple[int, ...]], list[StoredPart] | None] = _whole
    optional: tuple[str, ...] = ()
