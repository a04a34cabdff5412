"""Hashes of what ran: the model's files, this package's files, the installed versions.

A value is hashed by its JSON with sorted keys, after one round through JSON: so the hash of a
result is the same before it is written and after it is read.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

_BLOCK = 1 << 22
_THREADS = 4
_PACKAGE = Path(__file__).resolve().parents[2]
_NOT_PACKAGE = {"__pycache__", "shipped_models"}


class FileHash(msgspec.Struct, frozen=True):
    """A file: its name below the folder, its size, its SHA-256."""

    name: str
    bytes: int
    sha256: str


class Hashed(msgspec.Struct, frozen=True):
    """Files, and one hash over their names and hashes."""

    files: list[FileHash]
    sha256: str


class Installed(msgspec.Struct, frozen=True):
    """Installed distributions (name -> version), lock files of a checkout, a hash over both."""

    packages: dict[str, str]
    locks: dict[str, str]
    sha256: str


def plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return msgspec.json.decode(msgspec.json.encode(value))


def digest(value: Any) -> str:
    """The SHA-256 of a value's JSON, keys sorted."""
    return hashlib.sha256(msgspec.json.encode(plain(value), order="sorted")).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def hash_files(folder: Path, paths: list[Path]) -> Hashed:
    """The files at `paths`, below `folder`, by name."""
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(file_sha256, paths)
        files = [
            FileHash(path.relative_to(folder).as_posix(), path.stat().st_size, found)
            for path, found in zip(paths, sums, strict=True)
        ]
    files.sort(key=lambda one: one.name)
    return Hashed(files, hash_of(files))


def hash_of(files: list[FileHash]) -> str:
    """One hash over files that were hashed one by one."""
    return digest([(one.name, one.bytes, one.sha256) for one in files])


def model_files(directory: Path) -> Hashed:
    """All files of a model directory that are not hidden."""
    found = [
        path
        for path in directory.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(directory).parts)
    ]
    return hash_files(directory, found)


def package_files() -> Hashed:
    """This package's own files: code, templates, kernels' sources."""
    found = [
        path
        for path in _PACKAGE.rglob("*")
        if path.is_file()
        and not _NOT_PACKAGE & set(path.relative_to(_PACKAGE).parts)
        and path.suffix not in (".pyc", ".so")
    ]
    return hash_files(_PACKAGE, found)


def installed() -> Installed:
    """Every installed distribution, and the lock files beside a checkout's code."""
    packages = {str(d.metadata["Name"]).lower(): d.version for d in metadata.distributions()}
    folder = _PACKAGE.parents[1] / "requirements"
    locks = {path.name: file_sha256(path) for path in sorted(folder.glob("*.lock"))}
    packages = dict(sorted(packages.items()))
    return Installed(packages, locks, digest([packages, locks]))
