"""The folders that a download ends in: the cache of Hugging Face's tools, or a plain directory.

In the cache a file's content lies in `blobs/<digest>`, `snapshots/<commit>/<name>` links to it, and
`refs/<revision>` names the commit; it is written last, so a name never leads to half a model. A
plain directory holds the files under their names, and `.millrace-download/manifest.json` with what
they must contain.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Protocol

from millrace.download.source import Algorithm, Digest, RemoteFile

STATE_FOLDER = ".millrace-download"
HASH_BYTES = 4 << 20


class Destination(Protocol):
    """Where files of one version of a model go."""

    root: Path
    """The folder whose file system must have room."""
    lock: Path
    """The file that one download at a time holds."""

    def part(self, file: RemoteFile) -> Path:
        """The partial file."""

    def target(self, file: RemoteFile) -> Path:
        """The whole file."""

    def has(self, file: RemoteFile) -> bool:
        """Whether the whole file is there, as far as its name and size tell."""

    def note(self, file: RemoteFile) -> None:
        """Remember that a file is there, whatever stops the rest."""

    def finish(self, files: list[RemoteFile]) -> Path:
        """Make the model visible, now that all files are there; the model's directory."""


class HubCache:
    """A model in the cache of Hugging Face's tools. revision: the branch or tag that was asked for,
    or the commit itself."""

    def __init__(self, cache: Path, name: str, revision: str, commit: str) -> None:
        folder = f"models--{name.replace('/', '--')}"
        self.root = cache / folder
        self.lock = cache / ".locks" / folder / "millrace.lock"
        self._revision = revision
        self._commit = commit

    def part(self, file: RemoteFile) -> Path:
        return self.target(file).with_name(f"{file.identity}.part")

    def target(self, file: RemoteFile) -> Path:
        return self.root / "blobs" / file.identity

    def has(self, file: RemoteFile) -> bool:
        return _size(self.target(file)) == file.size

    def note(self, file: RemoteFile) -> None:
        """The blob's name says it."""

    def finish(self, files: list[RemoteFile]) -> Path:
        snapshot = self.root / "snapshots" / self._commit
        for file in files:
            _link(self.target(file), snapshot / file.name)
        if self._revision != self._commit:
            write_atomically(self.root / "refs" / self._revision, self._commit)
        return snapshot


class PlainDirectory:
    """A model in a directory of the user's. source, commit: written into the manifest."""

    def __init__(self, directory: Path, source: str, commit: str) -> None:
        self.root = directory
        self.lock = directory / STATE_FOLDER / "lock"
        self._source = source
        self._commit = commit
        self._manifest = directory / STATE_FOLDER / "manifest.json"
        self._noted = directory / STATE_FOLDER / "arrived.json"

    @cached_property
    def _known(self) -> dict[str, RemoteFile]:
        """The manifest, and what has come since; no other download changes it while this one has
        the lock."""
        return _read(self._manifest) | _read(self._noted)

    def part(self, file: RemoteFile) -> Path:
        return self.root / STATE_FOLDER / f"{file.name}.part"

    def target(self, file: RemoteFile) -> Path:
        return self.root / file.name

    def has(self, file: RemoteFile) -> bool:
        """A file that the manifest does not vouch for is read and hashed: it may be older."""
        if _size(self.target(file)) != file.size:
            return False
        entry = self._known.get(file.name)
        if entry is not None and entry.identity == file.identity:
            return True
        return file.digest is not None and content_digest(self.target(file), file) == file.digest

    def note(self, file: RemoteFile) -> None:
        self._known[file.name] = file
        self._write(self._noted)

    def finish(self, files: list[RemoteFile]) -> Path:
        for file in files:
            known = self._known.get(file.name)
            if known is None or known.identity != file.identity:
                self._known[file.name] = file
        self._write(self._manifest)
        self._noted.unlink(missing_ok=True)
        return self.root

    def _write(self, path: Path) -> None:
        document = {
            "source": self._source,
            "commit": self._commit,
            "files": [_entry(file) for _, file in sorted(self._known.items())],
        }
        write_atomically(path, json.dumps(document, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, RemoteFile]:
    """name -> what the file must contain; empty where there is no manifest."""
    return _read(directory / STATE_FOLDER / "manifest.json")


def manifest_source(directory: Path) -> str:
    """The model, with its version, that a directory was filled from; empty where nothing says."""
    path = directory / STATE_FOLDER / "manifest.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        document = json.loads(path.read_text(encoding="utf-8"))
        return "@".join(filter(None, (str(document["source"]), str(document["commit"]))))
    return ""


def _read(path: Path) -> dict[str, RemoteFile]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {entry["name"]: _remote_file(entry) for entry in entries}
    return {}


def content_digest(
    path: Path, file: RemoteFile, on_bytes: Callable[[int], None] = lambda _: None
) -> Digest | None:
    """The digest of a file's content, by the algorithm that its source uses; None if it has none.

    on_bytes: called with the count of bytes that were read."""
    if file.digest is None:
        return None
    hasher = file.digest.hasher(file.size)
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(HASH_BYTES):
            hasher.update(piece)
            on_bytes(len(piece))
    return Digest(file.digest.algorithm, hasher.hexdigest())


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file durably: readers see the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def free_bytes(folder: Path) -> int:
    """What the file system of a folder, which need not exist yet, has room for."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def bytes_on_disk(path: Path) -> int:
    """What a partial file, with its holes, takes of the disk; 0 if there is none."""
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0


def _entry(file: RemoteFile) -> dict[str, object]:
    digest = {file.digest.algorithm: file.digest.value} if file.digest else {}
    return {"name": file.name, "size": file.size, "identity": file.identity, "digest": digest}


def _remote_file(entry: dict[str, object]) -> RemoteFile:
    digests = entry["digest"]
    assert isinstance(digests, dict)
    digest: Digest | None = None
    for algorithm, value in digests.items():
        names: dict[str, Algorithm] = {"sha256": "sha256", "git": "git", "md5": "md5"}
        digest = Digest(names[algorithm], str(value))
    return RemoteFile(str(entry["name"]), int(str(entry["size"])), digest, str(entry["identity"]))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _link(blob: Path, name: Path) -> None:
    """A relative link to a blob; where a file system has no such links, a hard link or a copy."""
    name.parent.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(blob, name.parent)
    if name.is_symlink() and os.readlink(name) == relative:
        return
    temporary = name.with_name(f"{name.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        os.symlink(relative, temporary)
    except (OSError, NotImplementedError):
        try:
            os.link(blob, temporary)
        except OSError:
            shutil.copyfile(blob, temporary)
    os.replace(temporary, name)
