"""A model on the Hugging Face hub, or on a mirror that speaks its API.

Names, sizes and digests come from huggingface_hub, with its settings (HF_ENDPOINT, HF_TOKEN, stored
tokens). Bytes come by ranges over HTTP from the urls that the hub redirects to; that is not left to
huggingface_hub, which begins each file anew after a kill and checks no digest. Proxies and
certificates are those of the environment. The token goes to the hub's own host only, and into no
message.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import urljoin, urlsplit

from millrace.download.source import Digest, RemoteFile, TransferError
from millrace.errors import UserError, one_line
from millrace.version import __version__

METADATA_SECONDS = 30.0
SILENCE_SECONDS = 15.0  # without a byte from a connection
MOST_REDIRECTS = 5
LONGEST_WAIT = 300.0  # seconds that Retry-After may ask for
_READ_BYTES = 256 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are followed by hand: the token must not travel to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(slots=True)
class _Place:
    """Where a file's bytes were last found. url: empty until the hub was asked."""

    url: str = ""
    etag: str = ""
    ranges: bool = True


@dataclass
class HubModel:
    """A revision of a model at a hub. commit is known once `files` has been called.

    endpoint, token: None means as huggingface_hub is set up.
    """

    name: str
    revision: str = "main"
    endpoint: str | None = None
    token: str | None = None
    commit: str = ""
    _places: dict[str, _Place] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        from huggingface_hub import constants, get_token

        self.endpoint = (self.endpoint or constants.ENDPOINT).rstrip("/")
        self.token = self.token or get_token()
        self._opener = urllib.request.build_opener(
            _NoRedirects,
            urllib.request.HTTPSHandler(context=_certificates()),
            urllib.request.ProxyHandler(_proxies()),
        )

    def files(self) -> list[RemoteFile]:
        info = self._info()
        self.commit = str(info.sha)
        return [_remote_file(sibling) for sibling in info.siblings or []]

    def _info(self) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        try:
            return HfApi(endpoint=self.endpoint, token=self.token or False).model_info(
                self.name, revision=self.revision, files_metadata=True, timeout=METADATA_SECONDS
            )
        except HFValidationError as error:
            raise UserError(f"model {self.name!r}: {_line(error)}") from error
        except OfflineModeIsEnabled as error:
            raise UserError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it") from error
        except HfHubHTTPError as error:
            raise UserError(self._refusal(error.response.status_code)) from error
        except Exception as error:  # the HTTP library of huggingface_hub differs by version
            raise UserError(
                f"the hub at {self.endpoint} cannot be reached ({_line(error)}); HF_ENDPOINT names "
                f"a mirror, HTTPS_PROXY a proxy"
            ) from error

    def _refusal(self, status: int, said: str = "") -> str:
        """One line for a status that no further try will change."""
        model = f"model {self.name!r}, revision {self.revision!r}, at {self.endpoint}"
        if status == 404:
            return f"{model}: there is none; check the name and --revision" + _maybe(said)
        if status == 401 and not self.token:
            return (
                f"{model}: there is none, or it needs a token: set HF_TOKEN, or run: hf auth login"
            )
        if status in (401, 403):
            return (
                f"{model}: the token has no access{_maybe(said)}; a gated model's licence is "
                f"accepted on its page"
            )
        return f"{model}: the hub answered {status}{_maybe(said)}"

    # --- bytes ----------------------------------------------------------------------------------

    def has_ranges(self, file: RemoteFile) -> bool:
        return self._place(file).ranges

    def _place(self, file: RemoteFile) -> _Place:
        with self._lock:
            return self._places.setdefault(file.name, _Place())

    def read(self, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        place = self._place(file)
        try:
            with self._open(file, place, start, end) as response:
                skip = self._check(file, place, response, start, end)
                yield from _body(response, skip, end - start)
        except (OSError, http.client.HTTPException) as error:
            raise TransferError(_line(error)) from error

    def _open(
        self, file: RemoteFile, place: _Place, start: int, end: int
    ) -> http.client.HTTPResponse:
        """A response of status 200 or 206, from the url that was good last or through the hub."""
        hub = f"{self.endpoint}/{self.name}/resolve/{self.commit}/{urllib.parse.quote(file.name)}"
        url = place.url or hub
        for _ in range(MOST_REDIRECTS + 1):
            try:
                response = self._opener.open(
                    self._request(url, place, start, end), timeout=SILENCE_SECONDS
                )
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in (301, 302, 303, 307, 308):
                        url = urljoin(url, error.headers["Location"] or "")
                        continue
                    raise self._failure(error, url, hub, place) from error
            place.url = "" if url == hub else url
            return response  # type: ignore[no-any-return]
        raise TransferError(f"{file.name}: more than {MOST_REDIRECTS} redirects")

    def _request(self, url: str, place: _Place, start: int, end: int) -> urllib.request.Request:
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"the hub leads to {url.partition('?')[0]!r}, which is not HTTP")
        headers = {
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": f"millrace/{__version__}",
        }
        if place.etag and not place.etag.startswith("W/"):  # If-Range takes strong ones only
            headers["If-Range"] = place.etag
        if self.token and _origin(url) == _origin(self.endpoint or ""):
            headers["Authorization"] = f"Bearer {self.token}"
        return urllib.request.Request(url, headers=headers)

    def _failure(
        self, error: urllib.error.HTTPError, url: str, hub: str, place: _Place
    ) -> Exception:
        """What a status that is no success means: TransferError, or UserError to give up."""
        said = error.headers.get("X-Error-Message", "")
        if url != hub and error.code in (400, 401, 403, 404, 410):  # signed urls expire
            first, place.url = bool(place.url), ""
            return TransferError(f"the url expired ({error.code})", 0.0 if first else None)
        if error.code in (401, 403, 404):
            return UserError(self._refusal(error.code, said))
        return TransferError(f"the server answered {error.code}{_maybe(said)}", _asked(error))

    def _check(
        self,
        file: RemoteFile,
        place: _Place,
        response: http.client.HTTPResponse,
        start: int,
        end: int,
    ) -> int:
        """How many bytes of the body come before `start`."""
        headers = response.headers
        etag, known = headers.get("ETag", ""), place.etag
        place.etag = etag
        if headers.get("Content-Encoding", "identity") != "identity":
            raise TransferError(f"the server encoded the file as {headers['Content-Encoding']!r}")
        if response.status == 206:
            if known and etag != known:
                raise TransferError("another ETag than before", 0.0)
            _check_range(headers, start, end, file.size)
            return 0
        if known and etag != known:  # If-Range did not hold: ask for the range of the new one
            raise TransferError("another ETag than before", 0.0)
        length = headers.get("Content-Length")
        if length is not None and int(length) != file.size:
            raise TransferError(f"a body of {length} bytes where the hub lists {file.size}")
        place.ranges = place.ranges and (start, end) == (0, file.size)
        return start


def _body(response: http.client.HTTPResponse, skip: int, length: int) -> Iterator[bytes]:
    while length:
        piece = response.read1(_READ_BYTES)
        if not piece:
            raise TransferError(f"the connection closed with {length} bytes to come")
        if skip >= len(piece):
            skip -= len(piece)
            yield b""  # lets the caller see time pass
            continue
        piece, skip = piece[skip : skip + length], 0
        length -= len(piece)
        yield piece


def _check_range(headers: Message, start: int, end: int, size: int) -> None:
    text = headers.get("Content-Range", "")
    found = _CONTENT_RANGE.fullmatch(text.strip())
    if not found or int(found[1]) != start or int(found[2]) != end - 1:
        raise TransferError(f"asked for bytes {start} to {end - 1}, answered {text!r}")
    if found[3] not in ("*", str(size)):
        raise TransferError(f"the file has {found[3]} bytes there, and {size} in the hub's list")


def _remote_file(sibling: Any) -> RemoteFile:
    if sibling.lfs:
        digest = Digest("sha256", str(sibling.lfs.sha256))
        return RemoteFile(sibling.rfilename, int(sibling.lfs.size), digest, digest.value)
    if sibling.size is None or not sibling.blob_id:
        raise UserError(f"the hub gives no size or hash for {sibling.rfilename!r}")
    digest = Digest("git", str(sibling.blob_id))
    return RemoteFile(sibling.rfilename, int(sibling.size), digest, digest.value)


def _asked(error: urllib.error.HTTPError) -> float | None:
    """Seconds of Retry-After; None where it is missing or a date."""
    text = error.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT) if text.isdecimal() else None


def _certificates() -> ssl.SSLContext:
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if (path := os.environ.get(variable)) and os.path.isfile(path):
            return ssl.create_default_context(cafile=path)
    return ssl.create_default_context()


def _proxies() -> dict[str, str]:
    """Proxies of the environment; ALL_PROXY is for the schemes that have none of their own."""
    found = urllib.request.getproxies()
    return {scheme: found["all"] for scheme in ("http", "https") if "all" in found} | found


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _maybe(said: str) -> str:
    return f" ({said})" if said else ""


def _line(error: BaseException) -> str:
    """An exception as one line, without the query of a url: that may be a signature."""
    return re.sub(r"\?[^\s'\"]+", "", one_line(error))[:300]
