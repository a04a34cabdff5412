"""How far a batch is, in words: for the terminal, for logs, and as an HTML page.

The figures come from the journal and the windows. What they mean for the run is not decided here.
"""

from __future__ import annotations

import contextlib
import html
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

import msgspec

from millrace.batch.journal import Counts, Journal
from millrace.batch.window import Window

_DRAW_SECONDS = 0.5  # between two lines on a terminal
_LOG_SECONDS = 15.0  # between two lines elsewhere
_PAGE_SECONDS = 3.0
_RATE_SECONDS = 60.0  # over which the rate is measured


class Prices(msgspec.Struct, frozen=True):
    """Dollars for a million tokens of prompts and of outputs, and for an hour."""

    input: float = 0.0
    output: float = 0.0
    hourly: float = 0.0

    def cost(self, counts: Counts) -> float | None:
        """Dollars so far; None without a price."""
        if not (self.input or self.output or self.hourly):
            return None
        tokens = counts.usage.prompt * self.input + counts.usage.output * self.output
        return tokens / 1e6 + counts.seconds / 3600 * self.hourly


class Progress:
    """The observer of one run. page: file of the HTML page, if there is to be one."""

    def __init__(
        self,
        journal: Journal,
        prices: Prices,
        say: Callable[[str], None],
        page: Path | None = None,
    ) -> None:
        self._journal = journal
        self._prices = prices
        self._say = say
        self._page = page
        self._terminal = sys.stderr.isatty()
        self._said_at = self._page_at = monotonic()
        self._ends: deque[tuple[float, int]] = deque([(monotonic(), journal.counts.done)])
        self.windows: Sequence[Window] = ()

    def set_aside(self, window: Window) -> None:
        """As `Observer.set_aside`."""
        what = "is asked no more" if window.shut else "is set aside for a while"
        self._end_line()
        self._say(f"{window.endpoint.name} {what}: {window.problem}")

    def progressed(self) -> None:
        """As `Observer.progressed`."""
        now = monotonic()
        done = self._journal.counts.done
        if now - self._ends[-1][0] >= 1.0 or len(self._ends) < 2:
            self._ends.append((now, done))
        while len(self._ends) > 2 and self._ends[0][0] < now - _RATE_SECONDS:
            self._ends.popleft()
        if self._terminal and now - self._said_at >= _DRAW_SECONDS:
            self._said_at = now
            print(f"\r\x1b[K{self.line()}", end="", file=sys.stderr, flush=True)
        elif not self._terminal and now - self._said_at >= _LOG_SECONDS:
            self._said_at = now
            self._say(self.line())
        if now - self._page_at >= _PAGE_SECONDS:
            self._page_at = now
            self._write_page(refresh=True)

    def end(self) -> None:
        """The run has ended."""
        self._end_line()
        self._write_page(refresh=False)

    def _end_line(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        """Requests that end in a second, lately."""
        (began, had), now, done = self._ends[0], monotonic(), self._journal.counts.done
        return (done - had) / (now - began) if now > began else 0.0

    def line(self) -> str:
        """`1,200/50,000 done, 3 failed, 85/s, 9m 34s left, 1.2M+0.3M tokens, $0.42`"""
        counts = self._journal.counts
        parts = [f"{counts.done:,}/{counts.total:,} done"]
        if counts.failed:
            parts.append(f"{counts.failed:,} failed")
        left = counts.total - counts.done
        if self.rate and left:
            parts += [f"{self.rate:,.1f}/s", f"{duration(left / self.rate)} left"]
        usage = counts.usage
        parts.append(f"{usage.prompt:,} prompt tokens ({usage.cached:,} cached)")
        parts.append(f"{usage.output:,} output tokens")
        cost = self._prices.cost(counts)
        if cost is not None:
            parts.append(f"${cost:,.2f}")
        return ", ".join(parts)

    def _write_page(self, refresh: bool) -> None:
        if self._page is None:
            return
        text = _page(self.line(), self._journal.counts, self.windows, refresh)
        new = self._page.with_name(self._page.name + ".new")
        with contextlib.suppress(OSError):  # the page is not worth the batch
            new.write_text(text, encoding="utf-8")
            os.replace(new, self._page)


def duration(seconds: float) -> str:
    """Seconds in words: 45s, 9m 34s, 3h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02}m"


def _page(line: str, counts: Counts, windows: Sequence[Window], refresh: bool) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(w.endpoint.name)}<td>{w.finished:,}<td>{w.in_flight}"
        f"<td>{w.size}<td>{w.latency:.2f} s<td>{html.escape(w.problem) or 'works'}"
        for w in windows
    )
    again = f'<meta http-equiv="refresh" content="{_PAGE_SECONDS:g}">' if refresh else ""
    return (
        f'<!doctype html><meta charset="utf-8">{again}<title>millrace batch</title>'
        "<style>body{font:16px system-ui;margin:2em}td,th{padding:.2em 1em;text-align:right}"
        "progress{width:100%}td:first-child,td:last-child{text-align:left}</style>"
        f'<h1>Batch</h1><progress max="{counts.total}" value="{counts.done}"></progress>'
        f"<p>{html.escape(line)}<table><tr><th>server<th>answered<th>in flight<th>at most"
        f"<th>latency<th>state{rows}</table>"
    )
