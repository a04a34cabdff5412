"""Reads a YAML file of options, whatever is in it: keys and plain values, or one clear line.

What the keys mean is not known here.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from millrace.errors import ConfigError, one_line

MAX_BYTES = 1 << 20
MAX_PARTS = 10_000  # entries, each as often as aliases repeat it
_REASON_LENGTH = 300


def read_mapping(path: Path, name: str, example: str) -> dict[str, Any]:
    """The mapping in a file. Raises ConfigError for anything else, which calls the file `name` and
    shows `example`, a line that would work."""
    import yaml

    try:
        found = yaml.safe_load(_text(path, name))
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{name}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or an endless number
        reason = one_line(error)[:_REASON_LENGTH]
        raise ConfigError(f"{name}: not YAML: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{name}: use lines such as `{example}`")
    _check_amount(name, found)
    return found


def _text(path: Path, name: str) -> str:
    if not stat.S_ISREG(path.stat().st_mode):  # others may never end
        raise ConfigError(f"{name}: it is no plain file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: at most {MAX_BYTES} bytes work")
    return data.decode("utf-8")


def _check_amount(name: str, found: dict[str, Any]) -> None:
    """Aliases may repeat a part without end, or contain themselves."""
    left = MAX_PARTS
    parts: list[Any] = [found]
    while parts:
        part = parts.pop()
        inner = part.values() if isinstance(part, dict) else part
        left -= len(part)
        if left < 0:
            raise ConfigError(f"{name}: at most {MAX_PARTS} values work")
        parts += [one for one in inner if isinstance(one, dict | list)]
