"""Reads the YAML file of `--config`, whatever is in it: keys and plain values, or one clear line.

What the keys mean is not known here.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from millrace.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_PARTS = 10_000  # entries, each as often as aliases repeat it
_REASON_LENGTH = 300


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises ConfigError for anything else."""
    import yaml

    try:
        found = yaml.safe_load(_text(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or an endless number
        reason = " ".join(str(error).split())[:_REASON_LENGTH]
        raise ConfigError(f"--config {path}: not YAML: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"--config {path}: use lines such as `max-model-len: 4096`")
    _check_amount(path, found)
    return found


def _text(path: Path) -> str:
    if not stat.S_ISREG(path.stat().st_mode):  # others may never end
        raise ConfigError(f"--config {path}: it is no plain file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"--config {path}: at most {MAX_BYTES} bytes work")
    return data.decode("utf-8")


def _check_amount(path: Path, found: dict[str, Any]) -> None:
    """Aliases may repeat a part without end, or contain themselves."""
    left = MAX_PARTS
    parts: list[Any] = [found]
    while parts:
        part = parts.pop()
        inner = part.values() if isinstance(part, dict) else part
        left -= len(part)
        if left < 0:
            raise ConfigError(f"--config {path}: at most {MAX_PARTS} values work")
        parts += [one for one in inner if isinstance(one, dict | list)]
