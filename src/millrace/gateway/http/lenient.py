"""Bodies that are not what they should be: what can still be read of them for routing.

A field of another type than expected costs that field only. A body that is no JSON may still name
its model: multipart forms do, and JSON that only some parsers take. Nothing here decides whether a
request is valid; that is for the replica.
"""

from __future__ import annotations

import re
from email.message import Message
from typing import TypeVar

import msgspec
from msgspec import Raw

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_MODEL = re.compile(rb'"model"\s*:\s*"((?:[^"\\]|\\.){1,1000})"')
_FORM_NAME = re.compile(rb'content-disposition:[^\r\n]*[;\s]name="?model"?\s*(?:;|\r|$)', re.I)
_MAX_PARTS = 100
_MAX_MODEL = 1000  # bytes of a name


def decode_leniently(body: bytes, kind: type[_Struct]) -> _Struct | None:
    """A struct from a JSON object, without the fields whose values have another type.

    None if the body is no JSON object.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    values = {}
    for field in msgspec.structs.fields(kind):
        if field.name in fields:
            try:
                values[field.name] = msgspec.json.decode(fields[field.name], type=field.type)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
    return kind(**values)


def find_model(body: bytes, content_type: bytes) -> str | None:
    """The model that a body names which is no JSON object; None if none is found."""
    kind = Message()
    kind["Content-Type"] = content_type.decode("latin-1")
    if kind.get_content_maintype() == "multipart":
        boundary = kind.get_boundary()
        return _model_of_form(body, boundary.encode("latin-1")) if boundary else None
    found = _MODEL.search(body)
    if found is None:
        return None
    try:
        return msgspec.json.decode(b'"%b"' % found[1], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _model_of_form(body: bytes, boundary: bytes) -> str | None:
    """The value of the part `model` of a multipart body."""
    delimiter = b"--" + boundary
    begin = body.find(delimiter)
    for _ in range(_MAX_PARTS):
        if begin < 0:
            return None
        begin += len(delimiter)
        end = body.find(b"\r\n" + delimiter, begin)
        head_end = body.find(b"\r\n\r\n", begin, end if end >= 0 else None)
        if head_end >= 0 and _FORM_NAME.search(body, begin, head_end):
            return body[head_end + 4 : end][:_MAX_MODEL].decode("utf-8", "replace").strip()
        begin = end + 2 if end >= 0 else -1
    return None
