"""The environment of a child process that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_path(*folders: Path | str) -> str:
    """PYTHONPATH with these folders, the repository and its sources before what it holds already.

    What it holds stays: packages may come by it alone.
    """
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join([*map(str, folders), str(ROOT), str(ROOT / "src"), *inherited])


def child_environment(**variables: str) -> dict[str, str]:
    """This process's variables, with `python_path` and those given."""
    return {**os.environ, "PYTHONPATH": python_path(), **variables}
