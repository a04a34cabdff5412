from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import fsspec
import pytest

from millrace.download.object_store import ObjectStoreModel, remote_file
from millrace.download.run import Request, run
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
    with pytest.raises(UserError, match="no file is left"):
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
