"""The small JSON files of a checkpoint directory, and the sampling defaults that one holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from millrace.errors import CheckpointError, RequestError
from millrace.protocol import SamplingParams

FILE = "generation_config.json"
TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What a request gets where it says nothing. max_tokens: an upper bound the checkpoint sets."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file. Raises CheckpointError."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON object: {error}") from None


def vocab_size(directory: Path) -> int | None:
    """Rows of the embedding, from `config.json` (flat, or under `text_config`)."""
    config = read_json(directory / "config.json")
    text = config.get("text_config", config)
    size = text.get("vocab_size") if isinstance(text, dict) else None
    return size if isinstance(size, int) else None


def sampling_defaults(
    directory: Path | None, overrides: Mapping[str, Any] = MappingProxyType({})
) -> SamplingDefaults:
    """What `generation_config.json` suggests, as vLLM's `--generation-config auto` takes it.

    directory: None takes no file. overrides: entries that come before the file's.
    Raises CheckpointError.
    """
    path = "--override-generation-config" if directory is None or overrides else directory / FILE
    config = {**(read_json(directory / FILE) if directory else {}), **overrides}
    if unknown := overrides.keys() - TAKEN:
        raise CheckpointError(
            f"--override-generation-config: {', '.join(sorted(unknown))} cannot be set; "
            f"{', '.join(TAKEN)} can"
        )
    given = {
        "temperature": config.get("temperature"),
        "top_p": config.get("top_p"),
        "top_k": config.get("top_k"),
        "min_p": config.get("min_p"),
        "repetition_penalty": config.get("repetition_penalty"),
        "max_tokens": config.get("max_new_tokens"),
    }
    said = {name: value for name, value in given.items() if value is not None}
    try:
        defaults = msgspec.convert(said, SamplingDefaults)
        msgspec.convert(said, SamplingParams)  # for its ranges: a request must not fail by them
    except (msgspec.ValidationError, RequestError) as error:
        raise CheckpointError(
            f"{path}: {error}; mend it or start with --generation-config vllm"
        ) from None
    return defaults
