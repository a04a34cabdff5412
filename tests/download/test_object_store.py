from __future__ import annotations

import asyncio
import base64
import hashlib
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from millrace.common.backoff import BackoffPolicy
from millrace.download import object_store
from millrace.download.fetcher import Limits
from millrace.download.object_store import ObjectStoreModel, remote_file
from millrace.download.run import Request, run, run_verify
from millrace.download.source import Digest, TransferError
from millrace.errors import UserError

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 9000}


@pytest.fixture
def store() -> str:
    files = fsspec.filesystem("memory")
    for name, data in FILES.items():
        files.pipe_file(f"/bucket/model/{name}", data)
    return "memory://bucket/model"


def test_a_folder_of_a_store_comes_whole(store: str, tmp_path: Path) -> None:
    directory = run(Request(model=store, local_dir=tmp_path / "out", quiet=True))
    assert {name: (directory / name).read_bytes() for name in FILES} == FILES


def test_an_empty_folder_is_said(store: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no files"):
        run(Request(model=store + "s", local_dir=tmp_path / "out", quiet=True))


def test_digests_of_stores() -> None:
    md5 = hashlib.md5(b"x")
    google: dict[str, Any] = {"size": 1, "md5Hash": base64.b64encode(md5.digest()).decode()}
    assert remote_file("a", google).digest == Digest("md5", md5.hexdigest())
    amazon = {"size": 1, "ETag": f'"{md5.hexdigest()}"'}
    assert remote_file("a", amazon).digest == Digest("md5", md5.hexdigest())
    in_parts = {"size": 1, "ETag": f'"{md5.hexdigest()}-2"'}
    assert remote_file("a", in_parts).digest is None
    assert remote_file("a", in_parts).identity != remote_file("a", amazon).identity


def test_what_a_store_refuses_may_be_tried_again(store: str) -> None:
    model = ObjectStoreModel(store)
    (file,) = (file for file in model.files() if file.name == "model.safetensors")
    fsspec.filesystem("memory").rm("/bucket/model/model.safetensors")
    with pytest.raises(TransferError, match="model"):
        list(model.read(file, 0, 10))


class SilentStore(AsyncFileSystem):
    """A store whose first reads of large files never end; its files have no digests."""

    protocol = "silent"
    cachable = False
    silent = 0
    refused: ClassVar[set[str]] = set()
    read: ClassVar[list[str]] = []

    async def _find(self, path: str, **_: Any) -> dict[str, Any]:
        return {
            f"bucket/model/{name}": {"type": "file", "size": len(data)}
            for name, data in FILES.items()
        }

    async def _cat_file(self, path: str, start: int, end: int, **_: Any) -> bytes:
        name = path.removeprefix("bucket/model/")
        if name in self.refused:
            raise PermissionError(name)
        self.read.append(name)
        if end - start > 1000 and SilentStore.silent:
            SilentStore.silent -= 1
            await asyncio.sleep(3600)
        return FILES[name][start:end]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("silent", SilentStore, clobber=True)
    monkeypatch.setattr(SilentStore, "read", [])
    monkeypatch.setattr(SilentStore, "refused", set())
    monkeypatch.setattr(object_store, "READ_SECONDS", 0.3)
    quick = Limits(tries=1, backoff=BackoffPolicy(first=0.01, longest=0.1))
    monkeypatch.setattr("millrace.download.run.Limits", lambda workers: quick)
    return "silent://bucket/model"


def test_a_store_that_goes_silent_is_asked_again(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SilentStore, "silent", 1)
    directory = run(Request(model=silent, local_dir=tmp_path / "out", quiet=True))
    assert {name: (directory / name).read_bytes() for name in FILES} == FILES


def test_files_without_digests_come_once_and_can_be_verified(silent: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    SilentStore.refused = {"model.safetensors"}
    with pytest.raises(UserError, match="2 tries in a row failed"):
        run(Request(model=silent, local_dir=out, quiet=True))
    with pytest.raises(UserError, match="nothing says what"):
        run_verify(out, quiet=True)
    SilentStore.refused = set()
    run(Request(model=silent, local_dir=out, quiet=True))
    assert SilentStore.read.count("config.json") == 1
    assert run_verify(out, quiet=True) == 0
    (out / "config.json").write_bytes(b"[]")
    assert run_verify(out, quiet=True) == 1
