"""Bar charts as SVG: no package, the reader's own fonts, colours for white and for black."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3b82c4", "#d9772b", "#3f9d63", "#a763bd", "#b8932f", "#cc5570", "#7a8791", "#4bb3b0")
_LEFT, _RIGHT, _TOP, _ROW, _BAR = 190, 70, 46, 30, 20
_WIDTH = 760
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#66727c}"
    ".t{font-weight:600;font-size:15px}.e{text-anchor:end}.s{font-size:12px}"
)


@dataclass(frozen=True)
class Bar:
    """A bar: its label, its parts (one for each name of the chart), what stands behind it."""

    label: str
    parts: Sequence[float]
    note: str = ""


def bars(title: str, unit: str, names: Sequence[str], rows: Sequence[Bar]) -> str:
    """Horizontal bars of stacked parts."""
    most = max(sum(row.parts) for row in rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    lines = [_text(8, 22, title, "t")]
    y = _TOP
    for row in rows:
        lines.append(_text(_LEFT - 8, y + 15, row.label, "e"))
        x = float(_LEFT)
        for colour, part in zip(COLOURS, row.parts, strict=False):
            lines.append(_rect(x, y, part * scale, colour))
            x += part * scale
        note = row.note or f"{sum(row.parts):,.4g}"
        lines.append(_text(x + 6, y + 15, note, "s"))
        y += _ROW
    lines += _legend(names, unit, y + 14)
    return _picture(y + 34, title, lines)


def groups(title: str, unit: str, names: Sequence[str], rows: Sequence[Bar]) -> str:
    """Horizontal bars beside each other: one for each part of a row."""
    most = max(max(row.parts) for row in rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    lines, y = [_text(8, 22, title, "t")], float(_TOP)
    height = 11
    for row in rows:
        middle = y + height * len(row.parts) / 2 + 4
        lines.append(_text(_LEFT - 8, middle, row.label, "e"))
        for colour, part in zip(COLOURS, row.parts, strict=False):
            lines.append(_rect(_LEFT, y, part * scale, colour, height - 1))
            lines.append(_text(_LEFT + part * scale + 6, y + 9, f"{part:,.4g}", "s"))
            y += height
        y += 9
    lines += _legend(names, unit, y + 12)
    return _picture(y + 32, title, lines)


def _legend(names: Sequence[str], unit: str, y: float) -> list[str]:
    lines, x = [_text(8, y, unit, "s")], float(_LEFT)
    for colour, name in zip(COLOURS, names, strict=False):
        lines += [_rect(x, y - 10, 11, colour, 11), _text(x + 15, y, name, "s")]
        x += 30 + 6.7 * len(name)
    return lines


def _rect(x: float, y: float, width: float, colour: str, height: float = _BAR) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _picture(height: float, title: str, lines: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">'
    )
    return "\n".join([head, f"<style>{_STYLE}</style>", *lines, "</svg>"]) + "\n"
