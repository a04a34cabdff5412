"""Uploads: cut anywhere, they mean the same."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.batch.jobs.multipart import Upload
from millrace.common.api_errors import ApiError

TYPE = 'multipart/form-data; boundary="frontier"'
CONTENT = b"first line\r\n--front\r\n\r\nnot the end --frontie\r\nlast\n"


def form(content: bytes = CONTENT, name: str = "file") -> bytes:
    return (
        b'preamble\r\n--frontier\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--frontier\r\ncontent-disposition: form-data; name="%b"; filename="in.jsonl"\r\n'
        b"Content-Type: application/jsonl\r\n\r\n"
        % name.encode()
        + content
        + b"\r\n--frontier--\r\nepilogue"
    )


@given(st.lists(st.integers(0, len(form())), max_size=6))
def test_pieces_of_any_size_are_read_alike(cuts: list[int]) -> None:
    file = io.BytesIO()
    upload = Upload(TYPE, file, 1000)
    edges = [0, *sorted(cuts), len(form())]
    for start, end in zip(edges, edges[1:], strict=False):  # noqa: RUF007
        upload.feed(form()[start:end])
    assert upload.complete
    assert file.getvalue() == CONTENT
    assert (upload.fields, upload.filename) == ({"purpose": "batch"}, "in.jsonl")
    assert upload.size == len(CONTENT)


def test_one_byte_at_a_time() -> None:
    file = io.BytesIO()
    upload = Upload(TYPE, file, 1000)
    for byte in form(b""):
        upload.feed(bytes([byte]))
    assert (upload.complete, file.getvalue()) == (True, b"")


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        ("application/json", form(), 415),
        ("multipart/form-data", form(), 415),
        (TYPE, form(b"x" * 2000), 413),
        (TYPE, form(name="other"), 400),
        (TYPE, b"--frontier\r\n" + b"x" * 20_000, 400),
        (TYPE, b"--frontier\r\nContent-Type: a/b\r\n\r\nx\r\n--frontier--", 400),
        (TYPE, b"--frontier\r\nContent-Disposition: form-data; name=a\r\n\r\nx", 400),
    ],
)
def test_what_cannot_be_read_is_refused(kind: str, data: bytes, status: int) -> None:
    with pytest.raises(ApiError) as raised:
        Upload(kind, io.BytesIO(), 1000).feed(data)
    assert raised.value.status == status


def test_a_long_field_is_refused() -> None:
    upload = Upload(TYPE, io.BytesIO(), 1000)
    with pytest.raises(ApiError):
        upload.feed(
            b'--frontier\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 70_000
        )
