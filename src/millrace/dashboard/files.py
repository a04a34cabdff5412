"""The files of the live page and of the small pages beside it, as they are sent to a browser.

They hold no figures and no names, so they need no key. Each is sent with a policy that lets it load
nothing from anywhere else and run no script that stands in a page.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import NamedTuple

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
)
_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
}
# Path -> the file that it shows.
PATHS = {
    "/": "home.html",
    "/docs": "docs.html",
    "/dashboard": "dashboard.html",
    **{
        f"/dashboard/{name}": name
        for name in (
            *("page.css", "page.js", "data.js", "charts.js", "docs.js", "replicas.js"),
            "conversations.js",
            *("uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE.txt"),
        )
    },
}
EVENTS_PATH = "/dashboard/events"
HISTORY_PATH = "/dashboard/replica"


class File(NamedTuple):
    """A file's bytes and its media type."""

    body: bytes
    media_type: str


@functools.cache
def file_at(path: str) -> File | None:
    """The file that a path shows; None if there is none."""
    name = PATHS.get(path)
    if name is None:
        return None
    body = files("millrace.dashboard").joinpath("static", name).read_bytes()
    return File(body, _KINDS[name.rpartition(".")[2]])
