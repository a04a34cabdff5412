"""What is installed: floors that exclude known holes, and lock files that match pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
UNLOCKED = {"torch"}  # its build depends on the machine; the Makefile pins it
# The first version without the holes that docs/dependencies.md names.
FIRST_SOUND = {
    "filelock": "3.20.3",
    "h11": "0.16.0",
    "httptools": "0.6.2",
    "idna": "3.15",
    "jinja2": "3.1.6",
    "protobuf": "6.33.5",
    "pygments": "2.20.0",
    "pyyaml": "5.4",
    "requests": "2.33.0",
    "starlette": "1.3.1",
    "torch": "2.6.0",
    "urllib3": "2.7.0",
    "uvicorn": "0.11.7",
}


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [Requirement(line) for line in lines]


def pins(name: str) -> dict[str, list[tuple[Requirement, int]]]:
    """Package -> its pins in a lock file (one for each kind of machine), with their hashes."""
    text = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
    found: dict[str, list[tuple[Requirement, int]]] = {}
    for block in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]:
        pin = Requirement(block.split("\\\n")[0].split("--hash")[0].strip())
        hashes = len(re.findall(r"--hash=sha256:[0-9a-f]{64}", block))
        found.setdefault(canonicalize_name(pin.name), []).append((pin, hashes))
    return found


def version(pin: Requirement) -> Version:
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    return Version(specifier.version)


def test_floors_exclude_known_holes() -> None:
    floors = {
        canonicalize_name(one.name): Version(spec.version)
        for one in requirements("bench", "otel", "plan")
        for spec in one.specifier
        if spec.operator in (">=", "==")
    }
    for name, sound in FIRST_SOUND.items():
        assert floors[canonicalize_name(name)] >= Version(sound), name


@pytest.mark.parametrize(
    ("lock", "extras"), [("ship", ["bench", "otel", "plan"]), ("test", ["test"])]
)
def test_a_lock_file_has_every_requirement_with_hashes(lock: str, extras: list[str]) -> None:
    """If this fails, pyproject.toml has changed: run `make lock`."""
    locked = pins(lock)
    for wanted in requirements(*extras):
        name = canonicalize_name(wanted.name)
        if name in UNLOCKED:
            continue
        assert name in locked, f"{name} is not in {lock}.lock; run `make lock`"
        for pin, _ in locked[name]:
            assert version(pin) in wanted.specifier, f"{pin} is not {wanted}; run `make lock`"
    for found in locked.values():
        for pin, hashes in found:
            assert hashes > 0, pin


@pytest.mark.parametrize("lock", ["ship", "test"])
def test_a_lock_file_pulls_no_pytorch_and_names_no_host(lock: str) -> None:
    names = set(pins(lock))
    assert not names & UNLOCKED
    cuda = {name for name in names if name.startswith("nvidia-")}
    assert cuda <= {"nvidia-cuda-nvrtc", "nvidia-ml-py"}
    text = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "index" not in text.lower()
