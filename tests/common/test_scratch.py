"""Scratch directories: those of living processes stay, those of dead ones go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from millrace.common.scratch import PREFIX, ScratchDirectory

MAKE = """
import sys, time
from pathlib import Path
from millrace.common.scratch import ScratchDirectory
print(ScratchDirectory(Path(sys.argv[1])).path, flush=True)
time.sleep(600)
"""


def test_a_directory_is_private_and_goes(tmp_path: Path) -> None:
    scratch = ScratchDirectory(tmp_path)
    assert scratch.path.parent == tmp_path
    assert scratch.path.stat().st_mode & 0o077 == 0
    (scratch.path / "file").write_text("")
    scratch.remove()
    scratch.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_next_one_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    (left / "socket").write_text("")
    other = tmp_path / f"{PREFIX}without-a-lock"
    other.mkdir()
    first = ScratchDirectory(tmp_path)
    assert left.is_dir(), "its process lives"
    process.kill()
    process.wait()
    second = ScratchDirectory(tmp_path)
    assert not left.exists()
    assert first.path.is_dir()
    assert second.path.is_dir()
    assert other.is_dir()
    first.remove()
    second.remove()
