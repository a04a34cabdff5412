"""Child processes find what this process finds, packages that come by PYTHONPATH alone included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.child_environment import ROOT, child_environment, python_path


def test_what_python_path_holds_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_by_python_path.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import only_by_python_path, tests.support, millrace; print(millrace.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=child_environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).is_relative_to(ROOT)


@pytest.mark.parametrize("before", [None, "", "/one", "/one:/two"])
def test_no_entry_is_empty(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """An empty one would be the working directory."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONPATH", before)
    entries = python_path("/first").split(os.pathsep)
    assert entries == [
        "/first",
        str(ROOT),
        str(ROOT / "src"),
        *filter(None, (before or "").split(":")),
    ]
