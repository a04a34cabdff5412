"""Where models are: a directory that the user names, or one of the models that ship.

It looks at directories only; what lies in them is read elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from millrace.errors import CheckpointError


def find_model(name: str) -> Path:
    """The directory of a model: `name` itself, or a model of that name among those that ship.

    Raises CheckpointError that lists what there is.
    """
    direct = Path(name).expanduser()
    if direct.is_dir():
        if not (direct / "config.json").is_file():
            raise CheckpointError(f"{direct}: no config.json there; a model directory has one")
        return direct.resolve()
    found = shipped_models()
    if name in found:
        return found[name]
    there = f"these ship: {', '.join(sorted(found))}" if found else "none ships with this install"
    raise CheckpointError(f"model {name!r}: neither a directory nor a shipped model ({there})")


def shipped_models() -> dict[str, Path]:
    """name -> directory of every model that can be named; where two have one name, the first."""
    found: dict[str, Path] = {}
    for place in _places():
        if place.is_dir():
            for config in sorted(place.glob("*/config.json")):
                found.setdefault(config.parent.name, config.parent)
    return found


def _places() -> Iterator[Path]:
    """$MILLRACE_MODELS (as PATH is written), then `models/` of the checkout this runs from."""
    for place in os.environ.get("MILLRACE_MODELS", "").split(os.pathsep):
        if place:
            yield Path(place).expanduser().resolve()
    yield Path(__file__).resolve().parents[2] / "models"
