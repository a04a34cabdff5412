"""Prometheus pages of several replicas as one page; each sample gets the label of its replica.

A family's HELP and TYPE come once, followed by all its samples, as the format requires.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SUFFIXES = ("_bucket", "_count", "_sum", "_total", "_created")
_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{(.*)\})? (.+)$")


ENGINE_UP = "millrace:engine_up"


def engine_page(up: bool) -> str:
    """A page that says only whether an engine runs: for replicas that do not say it themselves."""
    return (
        f"# HELP {ENGINE_UP} 1 while an engine has loaded its model and runs; else 0.\n"
        f"# TYPE {ENGINE_UP} gauge\n{ENGINE_UP} {float(up)}\n"
    )


def merged(pages: Sequence[tuple[str, str]]) -> bytes:
    """One page from (label, page) pairs. Lines that are not samples are left out."""
    comments: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for label, page in pages:
        for line in page.splitlines():
            if line.startswith("# "):
                _, what, name, *_ = [*line.split(" ", 3), "", ""]
                if what in ("HELP", "TYPE"):
                    comments.setdefault(name, {}).setdefault(what, line)
                    samples.setdefault(name, [])
            elif found := _SAMPLE.match(line):
                name, _, labels, value = found.groups()
                family = _family(name, comments)
                marked = f'replica="{label}"' + (f",{labels}" if labels else "")
                samples.setdefault(family, []).append(f"{name}{{{marked}}} {value}")
    lines = []
    for family, rows in samples.items():
        if rows:
            lines += [*comments.get(family, {}).values(), *rows]
    return "".join(f"{line}\n" for line in lines).encode()


def _family(name: str, known: dict[str, dict[str, str]]) -> str:
    """The family of a sample, among those with HELP or TYPE."""
    if name in known:
        return name
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and name.removesuffix(suffix) in known:
            return name.removesuffix(suffix)
    return name
