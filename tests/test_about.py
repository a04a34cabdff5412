"""What `--version` says, and what a system that is not supported is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from millrace import __version__, about, cli


def test_the_version_names_commit_torch_and_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        card = tmp_path / f"0000:0{number}:00.0"
        card.mkdir()
        (card / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t 0\n")
    monkeypatch.setattr(about, "GPUS", tmp_path)
    monkeypatch.setattr(about, "commit", lambda: "0a1b2c3d4")
    first, second, third = about.describe().splitlines()
    assert first == f"millrace {__version__} (commit 0a1b2c3d4)"
    assert second.startswith("Python 3.")
    assert ", torch 2." in second
    assert third == "device: 2 x NVIDIA H200"


def test_without_a_gpu_the_device_is_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(about, "GPUS", tmp_path)
    assert about.device().startswith("cpu (")


@pytest.mark.parametrize(
    ("system", "platform", "machine", "said"),
    [
        ("Darwin", "darwin", "arm64", "this is Darwin on arm64, and Millrace runs on Linux"),
        ("Windows", "win32", "AMD64", "this is Windows on AMD64, and Millrace runs on Linux"),
        ("Linux", "linux", "riscv64", "this is Linux on riscv64, and Millrace runs on Linux"),
    ],
)
def test_other_systems_get_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    system: str,
    platform: str,
    machine: str,
    said: str,
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert cli.run(["--help"]) == 2
    assert capsys.readouterr().err.startswith(f"millrace: {said}")


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "millrace", "--version"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"millrace {__version__}")
