"""What a wheel holds beyond the package's own files: the models that ship, and the commit.

Native CPU kernels are not in it: they are compiled where they run, for that very processor, when
they are first needed.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODELS = ("millrace-mini", "millrace-mini-fp8", "millrace-mini-int4", "millrace-mini-moe")


class BuildWithModels(build_py):
    """build_py that adds `shipped_models/` and `commit.txt` to the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout's own files are found
            return
        package = Path(self.build_lib, "millrace")
        for name in MODELS:
            shutil.copytree(
                ROOT / "models" / name, package / "shipped_models" / name, dirs_exist_ok=True
            )
        (package / "commit.txt").write_text(_commit())


def _commit() -> str:
    """The checkout's commit; empty outside one."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=9", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


setup(cmdclass={"build_py": BuildWithModels})
