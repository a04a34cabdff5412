"""Which way of an op measured fastest, by device, shape and size.

A table is a JSON file for a device. Some ship, in measured/. `millrace tune kernels` writes one for
the machine's own device into the user's cache; its sections and shapes go before those that ship.
A section has, for each shape, lines: the greatest size that the line holds for, and the way. What a
way means is known by the op alone.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from bisect import bisect_left
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from millrace.errors import ConfigError
from millrace.kernels.dispatch import remembered

logger = logging.getLogger("millrace.kernels")

Shape = tuple[int, ...]
Way = str | tuple[int, ...]
Line = tuple[int, Way]  # the greatest size, and the way
Section = dict[Shape, tuple[Line, ...]]  # ascending

ANY_SIZE = 1 << 40
DIRECTORY = "MILLRACE_KERNEL_TABLES"  # environment variable: instead of the user's cache


def find(section: str, shape: Shape, size: int, device: str) -> Way | None:
    """The way that measured fastest. None: nothing was measured for this shape, or this size.

    device: its name, as `torch.cuda.get_device_name` tells it. Raises ConfigError if the user's
    table cannot be read.
    """
    lines = table(device).get(section, {}).get(shape, ())
    at = bisect_left(lines, size, key=lambda line: line[0])
    return lines[at][1] if at < len(lines) else None


def numbers_of(way: Way, names: tuple[str, ...]) -> tuple[int, ...]:
    """A way that is written as numbers. Raises ConfigError if it is not as many as `names`."""
    if isinstance(way, str) or len(way) != len(names):
        raise ConfigError(f"a table of kernel choices has {way!r} where {names} are expected")
    return way


def is_measured(section: str, device: str) -> bool:
    """Whether there are lines of this section for the device."""
    return bool(table(device).get(section))


@remembered
def table(device: str) -> dict[str, Section]:
    """All sections of a device, the user's lines before those that ship."""
    shipped = resources.files(__package__).joinpath("measured", _file_name(device))
    found = _read(shipped.read_text(), "measured") if shipped.is_file() else {}
    own = own_path(device)
    if own.is_file():
        try:
            text = own.read_text()
        except OSError as error:
            raise ConfigError(f"{own} cannot be read: {error}") from None
        for name, section in _read(text, str(own)).items():
            found[name] = found.get(name, {}) | section
        logger.info("choices of kernels come from %s", own)
    return found


def own_path(device: str) -> Path:
    """Where the user's table of a device is, or would be."""
    base = os.environ.get("XDG_CACHE_HOME")
    cache = Path(base) if base else Path.home() / ".cache"
    given = os.environ.get(DIRECTORY)
    return (Path(given) if given else cache / "millrace" / "kernels") / _file_name(device)


def write(path: Path, facts: Mapping[str, str], sections: Mapping[str, Section]) -> None:
    """Write a table; sections and shapes that the file has already, and these do not, stay.

    facts: what was measured with, such as the device and the version of torch. Raises ConfigError
    if the file is there and is no table, or cannot be written.
    """
    old = _read(path.read_text(), str(path)) if path.is_file() else {}
    whole: dict[str, Any] = dict(facts)
    for name in {**old, **sections}:
        merged = old.get(name, {}) | sections.get(name, {})
        whole[name] = {"x".join(map(str, s)): lines for s, lines in merged.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as new:
            new.write(json.dumps(whole, indent=1) + "\n")
        Path(new.name).replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None


def _file_name(device: str) -> str:
    return device.replace(" ", "_").replace("/", "_") + ".json"


def _read(text: str, path: str) -> dict[str, Section]:
    """The sections of a table; facts about the measurement are texts, and are passed over."""
    try:
        whole = json.loads(text)
        return {
            name: {_shape(shape): _lines(lines) for shape, lines in section.items()}
            for name, section in whole.items()
            if not isinstance(section, str)
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no table of kernel choices ({error}); remove it, or write it anew with: "
            "millrace tune kernels MODEL"
        ) from None


def _shape(text: str) -> Shape:
    return tuple(map(int, text.split("x")))


def _lines(lines: Any) -> tuple[Line, ...]:
    found = tuple((int(most), _way(way)) for most, way in lines)
    bounds = [most for most, _ in found]
    if bounds != sorted(set(bounds)):
        raise ValueError(f"sizes {bounds} do not ascend")
    return found


def _way(way: Any) -> Way:
    return way if isinstance(way, str) else tuple(int(number) for number in way)
