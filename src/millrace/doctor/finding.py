"""The result of one check, and how results are shown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.text import Text

Verdict = Literal["ok", "warn", "fail"]

_MARKS: dict[Verdict, tuple[str, str]] = {
    "ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red"),
}  # fmt: skip


class Finding(msgspec.Struct, frozen=True):
    """The result of one check. verdict: fail prevents a server from working, warn may hurt it.

    advice: what would help, if anything would.
    """

    topic: str
    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print a line for each finding, grouped by topic, then the totals, and what fails at the end.

    A topic with a warning comes after those without, and one that fails comes last.
    """
    findings = _worst_last(findings)
    width = max(len(one.name) for one in findings)
    for topic, group in groupby(findings, key=lambda one: one.topic):
        console.print(Text(topic, style="bold"))
        for one in group:
            mark, style = _MARKS[one.verdict]
            line = Text.assemble("  ", (f"{mark:4}", style), f"  {one.name:{width}}  {one.value}")
            console.print(line, soft_wrap=True)
            if one.advice:
                console.print(Text(f"{'':{width + 10}}{one.advice}", style="dim"), soft_wrap=True)
    fails = sum(one.verdict == "fail" for one in findings)
    warnings = sum(one.verdict == "warn" for one in findings)
    console.print(
        f"{len(findings)} looked at: {fails} {'fails' if fails == 1 else 'fail'}, "
        f"{warnings} {'warns' if warnings == 1 else 'warn'}"
    )
    for one in findings:
        if one.verdict == "fail":
            text = f"FAIL  {one.topic}: {one.name}: {one.value}"
            console.print(Text(text + (f"; {one.advice}" if one.advice else ""), style="bold red"))


def write_report(content: Mapping[str, Any], file: Path | None) -> None:
    """Write a report as JSON to a file, or to stdout for `-`; nowhere for None."""
    if file is None:
        return
    text = msgspec.json.format(msgspec.json.encode(content))
    if str(file) == "-":
        sys.stdout.write(text.decode() + "\n")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)


def _worst_last(findings: Sequence[Finding]) -> list[Finding]:
    """The findings by topic, in their order, but topics and findings that fail last."""
    weight: dict[Verdict, int] = {"ok": 0, "warn": 1, "fail": 2}
    topics = list(dict.fromkeys(one.topic for one in findings))
    worst = {
        topic: max(weight[one.verdict] for one in findings if one.topic == topic)
        for topic in topics
    }

    def place(one: Finding) -> tuple[int, int, int]:
        return worst[one.topic], topics.index(one.topic), weight[one.verdict]

    return sorted(findings, key=place)
