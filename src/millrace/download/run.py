"""A whole download, step by step: list, choose, look for room, lock, fetch, make visible."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from millrace.download.destination import (
    Destination,
    HubCache,
    PlainDirectory,
    bytes_on_disk,
    free_bytes,
)
from millrace.download.fetcher import Fetcher, Limits, Part
from millrace.download.hub import HubModel
from millrace.download.journal import Journal
from millrace.download.object_store import ObjectStoreModel
from millrace.download.progress import Progress, clock, size
from millrace.download.selection import select
from millrace.download.source import RemoteFile, Source
from millrace.download.verify import expected_files, faults, mending
from millrace.errors import UserError
from millrace.model_lookup import hub_cache

SPARE_BYTES = 64 << 20  # journals, and what others write meanwhile
LOCK_LINE_SECONDS = 30.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of the command; see its help."""

    model: str
    revision: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    cache_dir: Path | None = None
    local_dir: Path | None = None
    endpoint: str | None = None
    token: str | None = None
    max_workers: int = 8
    force_download: bool = False
    dry_run: bool = False
    quiet: bool = False


def run(request: Request) -> Path:
    """Download a model and print its directory. Raises UserError when that cannot be done."""
    source, revision = _source(request)
    files = select(source.files(), request.include, request.exclude)
    destination = _destination(request, source, revision)
    if request.dry_run:
        _list(files, destination)
        return destination.root
    begun = time.monotonic()
    with _held(destination.lock, request.quiet), _disk_errors(destination.root):
        arrived = _fetch(request, source, files, destination)
        directory = destination.finish(files)
    _say(request, files, arrived, time.monotonic() - begun)
    print(directory)
    return directory


def _source(request: Request) -> tuple[Source, str]:
    """The source that a model's name means, and the revision."""
    if "://" in request.model:
        if request.local_dir is None:
            raise UserError(f"{request.model}: --local-dir says where its files go")
        return ObjectStoreModel(request.model), ""
    name, _, suffix = request.model.partition("@")
    if suffix and request.revision and suffix != request.revision:
        raise UserError(f"revision {suffix!r} after the @ and --revision {request.revision!r}")
    if not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"model {name!r}: a name on the hub is owner/name, as Qwen/Qwen3.5-27B-FP8; an object "
            f"store's is a url, as gs://bucket/folder"
        )
    revision = suffix or request.revision or "main"
    if ".." in Path(revision).parts or revision.startswith("/"):
        raise UserError(f"revision {revision!r}: a branch, a tag or a commit is expected")
    return HubModel(name, revision, request.endpoint, request.token), revision


def _destination(request: Request, source: Source, revision: str) -> Destination:
    if request.local_dir is not None:
        if request.cache_dir is not None:
            raise UserError("give --local-dir or --cache-dir, not both")
        return PlainDirectory(request.local_dir.expanduser(), source.name, source.commit)
    cache = request.cache_dir.expanduser() if request.cache_dir else hub_cache()
    return HubCache(cache, source.name, revision, source.commit)


def _fetch(
    request: Request, source: Source, files: list[RemoteFile], destination: Destination
) -> int:
    """Fetch what is missing; how many bytes arrived."""
    wanted = [file for file in files if request.force_download or not destination.has(file)]
    wanted = list({destination.target(file): file for file in wanted}.values())  # equal contents
    _look_for_room(wanted, destination)
    parts = []
    try:
        for file in wanted:
            journal = Journal(destination.part(file), file.size, file.identity)
            parts.append(Part(file, journal, destination.target(file)))
        total = sum(file.size for file in wanted)
        done = sum(part.journal.done() for part in parts)
        with Progress(total, done, len(wanted), request.quiet) as progress:
            limits = Limits(workers=request.max_workers)

            def arrived(file: RemoteFile) -> None:
                destination.note(file)
                progress.finished()

            Fetcher(source, parts, limits, progress.add, arrived).run()
        return progress.arrived
    finally:
        for part in parts:
            part.journal.close()


def _look_for_room(files: list[RemoteFile], destination: Destination) -> None:
    there = sum(min(bytes_on_disk(destination.part(file)), file.size) for file in files)
    missing = sum(file.size for file in files) - there
    free = free_bytes(destination.root)
    if missing and missing + SPARE_BYTES > free:
        raise UserError(
            f"{destination.root}: {size(missing)} are to come and {size(free)} are free; make room "
            f"or name another disk with --cache-dir or --local-dir"
        )


@contextmanager
def _held(path: Path, quiet: bool) -> Iterator[None]:
    """Hold a lock; while another process has it, say so and wait. It ends with its process, and is
    a lock of the kernel, which network file systems know too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"{path.parent}: {error.strerror}; a model cannot be put there") from error
    lock, owner = FileLock(path), path.with_name(path.name + ".owner")
    while True:
        try:
            lock.acquire(timeout=LOCK_LINE_SECONDS if owner.exists() else 0.5)
            break
        except Timeout:
            if not quiet:
                print(f"waiting for {_owner(owner)}, which downloads the same", file=sys.stderr)
    try:
        with suppress(OSError):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """What a disk refuses, in one line."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "make room" if full else "mend that"
        raise UserError(
            f"{error.filename or root}: {reason}; {todo}, and the same command goes on from there"
        ) from error


def _list(files: list[RemoteFile], destination: Destination) -> None:
    for file in files:
        state = "there" if destination.has(file) else "to come"
        print(f"{size(file.size):>10}  {state:7}  {file.name}")
    total = sum(file.size for file in files)
    print(
        f"{size(total):>10}  in {len(files)} files; {size(free_bytes(destination.root))} are free"
    )


def _say(request: Request, files: list[RemoteFile], arrived: int, seconds: float) -> None:
    if request.quiet:
        return
    unchecked = sum(file.digest is None for file in files)
    checked = f"; the source has no digest of {unchecked}" if unchecked else "; digests are right"
    speed = f" in {clock(seconds)}, {size(arrived / max(seconds, 1e-3))}/s" if arrived else ""
    print(f"{len(files)} files, {size(arrived)} fetched{speed}{checked}", file=sys.stderr)


def run_verify(directory: Path, quiet: bool) -> int:
    """Print what differs from what was downloaded; 1 if anything does, else 0."""
    expected = expected_files(directory.expanduser())
    total = sum(file.size for file in expected.values())
    with Progress(total, 0, len(expected), quiet) as progress:
        found = faults(expected, progress.add)
    for fault in found:
        print(f"{fault.name}: {fault.text}")
    if not quiet:
        right = len(expected) - len(found)
        unknown = sum(file.digest is None for file in expected.values())
        sizes = f"; of {unknown} of them only the size is known" if unknown else ""
        print(f"{right} of {len(expected)} files, {size(total)}, are right{sizes}", file=sys.stderr)
        if command := mending(directory.expanduser(), found):
            print(f"get the others again with: {command}", file=sys.stderr)
    return 1 if found else 0
