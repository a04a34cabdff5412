"""The lines of OpenAI's batch files: requests as they come in, results as they go out.

A request line is {"custom_id", "method": "POST", "url", "body"}. A result line is {"id",
"custom_id", "response", "error"}; it goes to the output if the request was answered, else to the
error file. Who answers, and in which order, is not known here.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import msgspec
from msgspec import Raw

from millrace.common.http_client import error_text
from millrace.common.prefix_hash import PROMPT_FIELDS, hash_pieces
from millrace.errors import UserError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_LINE_BYTES = 32 << 20
MAX_CUSTOM_ID = 512  # characters
_POOLING = ("/v1/embeddings", "/v1/score", "/v1/rerank", "/v1/moderations")
_GROUP_BLOCKS = (1, 2, 4, 8, 16, 32, 64)  # of 256 bytes: where prompts are compared for sorting

_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_text = msgspec.json.Decoder(str).decode
_encode = msgspec.json.Encoder().encode


class LineError(UserError):
    """A line that cannot be sent; the message says why, without the number of the line."""


class RequestLine(msgspec.Struct, frozen=True):
    """One request. body: the JSON of its fields, by name."""

    custom_id: str
    url: str
    body: Mapping[str, Raw]

    def encoded_body(self) -> bytes:
        """The body as it is sent."""
        return _encode(self.body)

    def group(self) -> bytes:
        """A key by which requests whose prompts begin alike stand together once sorted."""
        pieces = [self.body[name] for name in PROMPT_FIELDS[self.url] if name in self.body]
        chain = hash_pieces(pieces)
        kept = (chain[count - 1] for count in _GROUP_BLOCKS if count <= len(chain))
        return b"".join((one & 0xFFFFFFFF).to_bytes(4, "big") for one in kept)


def read_line(data: bytes, model: str | None = None, url: str | None = None) -> RequestLine:
    """The request of a line. model: takes the place of the body's. url: the only one that is
    allowed. Raises LineError."""
    try:
        given = _fields(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LineError(f"this is not a JSON object ({error})") from None
    custom_id = _string(given, "custom_id")
    if not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise LineError(f"custom_id must have 1 to {MAX_CUSTOM_ID} characters")
    method = _string(given, "method") if "method" in given else "POST"
    if method != "POST":
        raise LineError(f"method {method!r}: only POST works")
    line = RequestLine(custom_id, _url(_string(given, "url"), url), _body(given, model))
    _check_prompt(line)
    return line


def _string(given: Mapping[str, Raw], name: str) -> str:
    if name not in given:
        raise LineError(f"{name} is missing")
    try:
        return _text(given[name])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise LineError(f"{name} must be a text") from None


def _url(found: str, wanted: str | None) -> str:
    if found in _POOLING:
        raise LineError(
            f"url {found}: only text is generated here; use an embedding server for this line"
        )
    if found not in URLS:
        raise LineError(f"url {found[:100]!r} is unknown; there are {', '.join(URLS)}")
    if wanted is not None and found != wanted:
        raise LineError(f"url {found} differs from the batch's endpoint {wanted}")
    return found


def _body(given: Mapping[str, Raw], model: str | None) -> dict[str, Raw]:
    if "body" not in given:
        raise LineError("body is missing")
    try:
        body = _fields(given["body"])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise LineError("body must be a JSON object") from None
    if model is not None:
        body["model"] = Raw(_encode(model))
    elif not _string(body, "model"):
        raise LineError("body.model is empty")
    if bytes(body.get("stream", b"false")) not in (b"false", b"null"):
        raise LineError("body.stream: answers of a batch are not streamed; leave it out")
    body.pop("stream", None)
    body.pop("stream_options", None)
    return body


def _check_prompt(line: RequestLine) -> None:
    needed = PROMPT_FIELDS[line.url][-1]  # before it only what may be missing
    if needed in line.body and bytes(line.body[needed]) not in (b"null", b"[]"):
        return
    if line.url == "/v1/responses" and "prompt" in line.body:
        return
    raise LineError(f"body.{needed} is missing or empty")


# --- results -------------------------------------------------------------------------------------


class Usage(msgspec.Struct, frozen=True):
    """Tokens of answers. cached: of the prompts, those that had been computed before."""

    prompt: int = 0
    output: int = 0
    cached: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt, self.output + other.output, self.cached + other.cached
        )


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _ReportedUsage(msgspec.Struct):
    """`usage` of an answer, in the words of either API."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _ReportedUsage | None = None


_answer = msgspec.json.Decoder(_Answer).decode


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: Raw


class ErrorDetails(msgspec.Struct):
    """Why a line has no answer of a server."""

    code: str
    message: str


class _Result(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: ErrorDetails | None


def read_usage(body: bytes) -> Usage | None:
    """The tokens of an answer; None if the body is not the JSON of an answer."""
    try:
        found = _answer(body).usage or _ReportedUsage()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    details = found.prompt_tokens_details or found.input_tokens_details or _Details()
    return Usage(
        found.prompt_tokens or found.input_tokens or 0,
        found.completion_tokens or found.output_tokens or 0,
        details.cached_tokens or 0,
    )


def response_line(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """The line of a request that a server has answered, or refused."""
    try:
        one_line = Raw(msgspec.json.format(body, indent=-1))  # no line break in the body
        msgspec.json.decode(one_line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = {"message": error_text(body), "type": "invalid_body", "code": None}
        one_line = Raw(_encode({"error": message}))
    return _result(custom_id, _Response(status, request_id, one_line), None)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """The line of a request that has got no answer."""
    return _result(custom_id, None, ErrorDetails(code, message))


def _result(custom_id: str, response: _Response | None, error: ErrorDetails | None) -> bytes:
    id = f"batch_req_{uuid.uuid4().hex}"
    return _encode(_Result(id, custom_id, response, error)) + b"\n"
