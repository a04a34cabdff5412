"""An installed wheel serves the shipped model from any directory, without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
import pytest

from tests.support.live_server import started

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = tuple(f"models/millrace-mini{twin}" for twin in ("", "-fp8", "-int4", "-moe"))
PARTS = ("src", *SHIPPED, "README.md", "LICENSE")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in")


def copied_source(place: Path) -> Path:
    """What a wheel is built from, without `.git` and without what other builds left."""
    for name in (*PARTS, *FILES):
        source, copy = ROOT / name, place / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, copy, ignore=ignored)
        else:
            shutil.copy(source, copy)
    return place


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `millrace` of a new environment that sees the packages of this one."""
    place = tmp_path_factory.mktemp("wheel")
    source = copied_source(place / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    alone = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *alone, "-w", str(place), str(source)], check=True)
    (wheel,) = place.glob("*.whl")
    shutil.rmtree(source)
    environment = place / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    return environment / "bin" / "millrace"


@pytest.mark.slow
def test_the_shipped_model_is_served_from_any_directory(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("PYTHONPATH", "MILLRACE_MODELS"):
        monkeypatch.delenv(variable, raising=False)
    where = "import millrace; print(millrace.__file__)"
    python = program.with_name("python")
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{program.parents[1]}{os.sep}")
    command = [str(program), "serve", "millrace-mini", "--port=0", "--max-num-seqs=4"]
    with started(command, tmp_path / "log") as server:
        server.wait_ready(120)
        message = {"role": "user", "content": "What is 7 times 8?"}
        body = {"messages": [message], "temperature": 0, "max_tokens": 64}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert re.search(r"\b56\b", answer["choices"][0]["message"]["content"])
