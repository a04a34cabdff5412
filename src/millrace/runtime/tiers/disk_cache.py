"""Cached prefixes in files, which survive the process.

A record has two files, named by its key: its pages, and the state at its end. Each begins with a
line of its own, a header with its size and checksum, and what is needed to find the record after a
start. A file is written beside its place and renamed, so a process that is killed leaves no half of
one. Files lie in a folder for everything that decides whether they can be used: model, weights,
data types, layout. They hold users' prompts, so only their owner can read them.
"""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from fcntl import LOCK_EX, LOCK_NB, flock
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

import msgspec
from torch import Tensor

from millrace.config import EngineConfig
from millrace.errors import ConfigError
from millrace.model.cache_spec import CacheSpec
from millrace.protocol import FileMove, FoundFile
from millrace.runtime.transfer.device_wait import Ready, comes_within
from millrace.runtime.transfer.identity import weights_of

logger = logging.getLogger(__name__)

FORMAT = 2
MAGIC = b"millrace prefix 2\n"
PAGES, STATE = ".pages", ".state"
_UNFINISHED = ".new"
MOST_ENGINES = 256  # of one host, with one model
READY_SECONDS = 60.0  # for copies of the device that a file waits for
_LENGTH = 8  # bytes of the header's length


class _Header(msgspec.Struct):
    """Of a file: its contents' size and checksum; found: of pages, how to find the record."""

    size: int
    checksum: int
    found: FoundFile | None = None


class DiskCache:
    """The files of one folder, or of one beside it if another engine uses that.

    memory: the host's, which files are written from and read to.
    """

    def __init__(self, folder: Path, memory: Tensor) -> None:
        self._memory = memory.numpy().data
        try:
            self.folder, self._lock = _take_folder(folder)
        except OSError as error:
            raise ConfigError(
                f"disk_cache {folder.parent}: cannot be written ({error.strerror}); "
                "give a directory that this user may write"
            ) from None
        # One thread keeps the order of writes, reads and deletes of a file.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="disk-cache")

    def store(self, files: list[FileMove], ready: Ready | None = None) -> Future[bool]:
        """Write files. ready: what has to end before. The result: whether all are written."""
        return self._thread.submit(lambda: _ended(ready) and self._store(files))

    def fetch(self, files: list[FileMove], ready: Ready | None = None) -> Future[bool]:
        """Read files into memory. ready: what has to end before. The result: whether all were there
        and whole."""
        return self._thread.submit(lambda: _ended(ready) and self._fetch(files))

    def delete(self, deletes: list[tuple[str, bool]]) -> None:
        """Delete the files of records: their states, and their pages if the second is true."""
        self._thread.submit(self._delete, deletes)

    def found(self) -> dict[str, FoundFile]:
        """The records that are there, by key. What an earlier process left half done is deleted."""
        for path in self.folder.glob(f"*{_UNFINISHED}"):
            path.unlink(missing_ok=True)
        records = {}
        for path in self.folder.glob(f"*{PAGES}"):
            header = _read_header(path)
            if header is None or header.found is None:
                path.unlink(missing_ok=True)
                continue
            state = path.with_suffix(STATE)
            records[path.stem] = msgspec.structs.replace(
                header.found, has_state=state.exists(), used=path.stat().st_mtime
            )
        for path in self.folder.glob(f"*{STATE}"):
            if path.stem not in records:
                path.unlink(missing_ok=True)
        return records

    def close(self) -> None:
        """Wait for what has begun; drop the rest."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        os.close(self._lock)

    # --- on the thread ------------------------------------------------------------------------

    def _store(self, files: list[FileMove]) -> bool:
        try:
            for file in files:
                found = FoundFile(file.parent, file.first, file.tokens, file.salt, file.kind)
                if file.state_at >= 0:
                    self._write(file.key + STATE, file.state_at, file.state_bytes, None)
                self._write(file.key + PAGES, file.pages_at, file.pages_bytes, found)
        except OSError as error:
            logger.warning("disk cache: a prefix is not written: %s", error)
            return False
        return True

    def _write(self, name: str, at: int, size: int, found: FoundFile | None) -> None:
        content = self._memory[at : at + size]
        header = msgspec.msgpack.encode(_Header(size, crc32(content), found))
        beside = self.folder / (name + _UNFINISHED)
        with os.fdopen(os.open(beside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as out:
            out.write(MAGIC + len(header).to_bytes(_LENGTH, "little") + header)
            out.write(content)
        beside.replace(self.folder / name)

    def _fetch(self, files: list[FileMove]) -> bool:
        for file in files:
            parts = (
                (PAGES, file.pages_at, file.pages_bytes),
                (STATE, file.state_at, file.state_bytes),
            )
            for suffix, at, size in parts:
                if at >= 0 and not self._read(self.folder / (file.key + suffix), at, size):
                    return False
        return True

    def _read(self, path: Path, at: int, size: int) -> bool:
        try:
            header = _read_header(path)
            if header is None or header.size != size:
                logger.warning("disk cache: %s is damaged", path)
                return False
            place = self._memory[at : at + size]
            with path.open("rb") as file:
                file.seek(-size, os.SEEK_END)
                whole = file.readinto(place) == size
            if whole and crc32(place) == header.checksum:
                os.utime(path)
                return True
        except OSError as error:
            logger.warning("disk cache: %s", error)
            return False
        logger.warning("disk cache: %s is damaged", path)
        return False

    def _delete(self, deletes: list[tuple[str, bool]]) -> None:
        for key, pages in deletes:
            (self.folder / (key + STATE)).unlink(missing_ok=True)
            if pages:
                (self.folder / (key + PAGES)).unlink(missing_ok=True)


def _ended(ready: Ready | None) -> bool:
    """Wait until it has come; False if it does not."""
    if ready is None or comes_within(ready, READY_SECONDS):
        return True
    logger.warning("disk cache: the device has not ended its copies")
    return False


def _take_folder(wanted: Path) -> tuple[Path, int]:
    """A folder that no other process uses, and its lock, which ends with this process."""
    for number in range(MOST_ENGINES):
        folder = wanted.with_name(f"{wanted.name}.{number}") if number else wanted
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            flock(lock, LOCK_EX | LOCK_NB)
            return folder, lock
        except BlockingIOError:
            os.close(lock)
    raise OSError(0, f"{MOST_ENGINES} engines use it")


def _read_header(path: Path) -> _Header | None:
    """The header of a file; None if it is damaged, or of another size than it says."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            length = int.from_bytes(file.read(_LENGTH), "little")
            rest = path.stat().st_size - len(MAGIC) - _LENGTH
            if not 0 < length <= rest:
                return None
            header = msgspec.msgpack.decode(file.read(length), type=_Header)
            return header if header.size == rest - length else None
    except (OSError, msgspec.DecodeError):
        return None


# --- what the files belong to --------------------------------------------------------------------


def cache_folder(
    config: EngineConfig, spec: CacheSpec, model: Path, rank: int = 0, ranks: int = 1
) -> Path:
    """The folder of prefixes that this rank can use, in the one that was asked for."""
    assert config.disk_cache
    facts = {
        "format": FORMAT,
        "record": [list(map(str, part)) for part in spec.record()],
        "page": config.page_size,
        "dtype": config.dtype,
        "model": weights_of(model) if config.args.load_format != "dummy" else config.args.seed,
        "overrides": config.args.hf_overrides,
        **({"rank": [rank, ranks]} if ranks > 1 else {}),
        **({"batch_invariant": True} if config.args.batch_invariant else {}),
    }
    name = blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    return Path(str(config.args.disk_cache)).expanduser() / name
