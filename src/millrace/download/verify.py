"""Whether what lies on the disk is what was downloaded, by reading all of it again."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from millrace.download.destination import content_digest, manifest_source, read_manifest
from millrace.download.source import Digest, RemoteFile
from millrace.errors import UserError


@dataclass(frozen=True, slots=True)
class Fault:
    """name: of the file. text: what is wrong with it."""

    name: str
    text: str


def expected_files(directory: Path) -> dict[Path, RemoteFile]:
    """path -> what must be there: by the manifest of a download, or by the names of the blobs in
    the cache of Hugging Face's tools. Raises UserError where neither says anything."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if manifest := read_manifest(directory):
        return {directory / name: file for name, file in manifest.items()}
    found = {
        path: _by_blob(path, str(path.relative_to(directory)))
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() and path.readlink().parent.name == "blobs"
    }
    if not found:
        raise UserError(
            f"{directory}: neither a directory that millrace download filled nor a snapshot in a "
            f"Hugging Face cache, so nothing says what its files must contain"
        )
    return found


def _by_blob(path: Path, name: str) -> RemoteFile:
    """What a link into `blobs` promises: the blob's name is its digest."""
    value = path.readlink().name
    size = path.stat().st_size if path.exists() else 0
    digest = Digest("sha256" if len(value) == 64 else "git", value)
    return RemoteFile(name, size, digest, value)


def faults(
    expected: dict[Path, RemoteFile], on_bytes: Callable[[int], None] = lambda _: None
) -> list[Fault]:
    """What is missing or different, in the order of names."""
    found = [_fault(path, file, on_bytes) for path, file in expected.items()]
    return [fault for fault in found if fault is not None]


def mending(directory: Path, found: list[Fault]) -> str:
    """The command that fetches faulty files again; empty where there are none, or no source."""
    if source := manifest_source(directory):
        place = ["--local-dir", str(directory)]
    else:
        cache, source = _cached(directory.resolve())
        place = ["--cache-dir", str(cache)]
    if not source or not found:
        return ""
    names = [word for fault in found for word in ("--include", glob.escape(fault.name))]
    return shlex.join(["millrace", "download", source, *place, "--force-download", *names])


def _cached(snapshot: Path) -> tuple[Path, str]:
    """The cache that a snapshot is in, and its model with the commit; empty if it is in none."""
    model = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not model.name.startswith("models--"):
        return model, ""
    name = model.name.removeprefix("models--").replace("--", "/", 1)
    return model.parent, f"{name}@{snapshot.name}"


def _fault(path: Path, file: RemoteFile, on_bytes: Callable[[int], None]) -> Fault | None:
    if not path.is_file():
        return Fault(file.name, "is missing")
    size = path.stat().st_size
    if size != file.size:
        return Fault(file.name, f"has {size} bytes instead of {file.size}")
    if content_digest(path, file, on_bytes) != file.digest:
        return Fault(file.name, "has another content than was downloaded")
    return None
