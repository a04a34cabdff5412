"""A report as data: cards, sections, tables, charts; and the templates that make HTML of it.

The templates escape every text. This module knows nothing of benchmarks: other reports use it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import jinja2
import msgspec

from millrace.bench.report.chart import COLOURS, Picture

_FIGURE = 40  # characters that a figure has at most, its interval included

# The first row holds the headings. After a line break in a cell there is what belongs to its
# figure, such as a range.
Table = Sequence[Sequence[str]]


class CardLine(msgspec.Struct, frozen=True):
    """One value. name: whose it is, where a card has several; detail: where it comes from."""

    value: str
    detail: str = ""
    name: str = ""


class Card(msgspec.Struct, frozen=True):
    """What a reader should see first: one question, and its answer."""

    title: str
    lines: list[CardLine]


class Chart(msgspec.Struct, frozen=True):
    """A picture under a title."""

    title: str
    picture: Picture


class Source(msgspec.Struct, frozen=True):
    """How some result files were made."""

    files: list[str]
    facts: list[str]


class NamedTable(msgspec.Struct, frozen=True):
    """A table under a title."""

    title: str
    table: Table


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A heading and what is under it, in the order of the fields."""

    title: str
    introduction: Sequence[str] = ()
    table: Table = ()
    tables: Sequence[NamedTable] = ()
    charts: Sequence[Chart] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    sources: Sequence[Source] = ()

    @property
    def empty(self) -> bool:
        """Whether it shows nothing; an introduction alone shows nothing."""
        shown = (self.table, self.tables, self.charts, self.warnings, self.notes, self.sources)
        return not any(shown)


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """The whole report. files: how many results are in it; 0 for one that is in no file."""

    models: list[str]
    files: int
    made: str
    version: str
    sections: list[Section]
    title: str = "Benchmark report"
    cards: Sequence[Card] = ()
    warnings: Sequence[str] = ()


def environment() -> jinja2.Environment:
    """The templates of the report; every value that they insert is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("millrace.bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["px"] = lambda value: f"{value:.1f}"
    templates.globals["colours"] = COLOURS
    templates.filters["wordy"] = wordy_columns
    return templates


def wordy_columns(table: Table) -> list[int]:
    """The columns that hold sentences and not figures; these are read from the left, and wrapped.
    The first one is never among them."""
    return [
        at
        for at in range(1, len(table[0]))
        if any(len(line) > _FIGURE for row in table[1:] for line in row[at].split("\n"))
    ]


def one_chart(title: str, picture: Picture | None) -> list[Chart]:
    """A picture under its title; nothing for no picture."""
    return [] if picture is None else [Chart(title, picture)]


def table_of(rows: Sequence[Sequence[str]]) -> Table:
    """A table; nothing where there are headings alone."""
    return rows if len(rows) > 1 else ()


def figure_text(value: float) -> str:
    """A figure with three digits or more: 1,481 or 82.5 or 2.60 or 0.253."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{value:.3g}"
