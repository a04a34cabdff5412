"""Published models by name: the entries of their config.json that say what a step costs.

Any directory with a config.json is as good. Reading a description imports torch, as families do.
"""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from millrace.errors import ConfigError
from millrace.model.config import ModelConfig


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Name -> entries of config.json, without formats."""
    text = resources.files("millrace.plan.facts").joinpath("models.json").read_bytes()
    found: dict[str, dict[str, Any]] = msgspec.json.decode(text)
    return found


def model_config(name: str) -> ModelConfig:
    """A model of the catalogue, or of a directory that has a config.json.

    Raises ConfigError with the names that there are, CheckpointError for what cannot be run.
    """
    short = name.lower().rsplit("/", 1)[-1].removesuffix("-fp8")
    if (Path(name) / "config.json").is_file():
        from millrace.model.config import read_config

        return read_config(name)
    if short not in catalogue():
        raise ConfigError(
            f"unknown model {name!r}: no directory with a config.json, and none of "
            f"{', '.join(catalogue())}"
        )
    return _listed(short)


@functools.cache
def _listed(name: str) -> ModelConfig:
    from millrace.model.config_file import ConfigFile
    from millrace.model.registry import family_of, quantization_of

    entries = catalogue()[name]
    file = ConfigFile(Path(name), entries, entries, {}, False, quantization_of(None))
    return family_of(file.model_type, file.architectures).read(file)
