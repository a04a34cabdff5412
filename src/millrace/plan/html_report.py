"""A choice as one HTML file: tables, and plots as SVG; it loads nothing from anywhere."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from millrace.plan.predict.choice import Candidate, Choice, label
from millrace.plan.predict.flags import gateway_command, serve_command
from millrace.plan.predict.prediction import Prediction
from millrace.plan.text_report import ROWS, short, span

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;
color:#222}table{border-collapse:collapse;margin:1rem 0}
td,th{border-bottom:1px solid #ddd;padding:.25rem .7rem}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}pre{background:#f5f5f5;padding:.7rem;
overflow-x:auto}svg{max-width:100%;height:auto}.bar{fill:#3572b0}.other{fill:#bbb}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}td,th{border-color:#444}
pre{background:#242424}text{fill:#ddd}}
"""
WIDTH, HEIGHT, MARGIN = 640, 320, 60


def page(found: Choice, parts: dict[str, float]) -> str:
    """parts: seconds of the best settings' decode step, by part."""
    best = found.best.prediction
    title = f"Plan for {best.deployment.description.model}"
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>Best by {found.objective}: {_text(label(best.deployment))}. Rests on: "
        f"{_text(best.rests_on)}.</p>",
        _figures(best),
        *(f"<p>Warning: {_text(warning)}.</p>" for warning in best.memory.warnings),
        f"<h2>Start</h2><pre>{_text(serve_command(best.deployment))}\n"
        f"{_text(gateway_command(best.deployment))}</pre>",
        "<h2>Throughput against latency</h2>", _scatter(found),
        _candidates(found.pareto, why=False),
        "<h2>Where a decode step's time goes</h2>", _bars(parts),
        "<h2>Why others lost</h2>", _candidates(found.others[:40], why=True),
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """words: so many first columns are text; the others are numbers, but for `why`."""
    kinds = ["" if i < words or name == "why" else ' class="n"' for i, name in enumerate(head)]
    first = "".join(f"<th{k}>{_text(n)}</th>" for k, n in zip(kinds, head, strict=True))
    lines = (
        "<tr>"
        + "".join(f"<td{k}>{_text(c)}</td>" for k, c in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{first}</tr>{''.join(lines)}</table>"


def _figures(found: Prediction) -> str:
    rows = [
        (ROWS[name][0], *span(bar, ROWS[name][2]), ROWS[name][1])
        for name, bar in found.bars.items()
    ]
    return _table(("", "predicted", "80% bar", "unit"), rows)


def _candidates(rows: Sequence[Candidate], *, why: bool) -> str:
    head = ["settings", "tok/s", "tok/s a GPU", "TPOT ms", "TTFT ms", "$ a million"]
    lines = []
    for one in rows:
        p = one.prediction
        line = [
            label(p.deployment), short(one.tokens), short(one.tokens / p.deployment.gpus),
            short(one.tpot * 1e3), short(p.steady.ttft * 1e3),
            f"{one.dollars:.3f}" if one.dollars else "",
        ]  # fmt: skip
        lines.append([*line, one.why] if why else line)
    return _table([*head, "why"] if why else head, lines)


def _scatter(found: Choice) -> str:
    """tok/s a GPU over tok/s a user: all settings grey, those that no other beats blue."""
    all_of_them = [found.best, *found.others]
    points = [(1 / one.tpot, one.tokens / one.prediction.deployment.gpus) for one in all_of_them]
    unbeaten = [(1 / one.tpot, one.tokens / one.prediction.deployment.gpus) for one in found.pareto]
    most = [max(value[i] for value in [*points, *unbeaten]) * 1.05 for i in (0, 1)]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = MARGIN + point[0] / most[0] * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - point[1] / most[1] * (HEIGHT - 2 * MARGIN)

    dots = "".join(
        f'<circle class="{kind}" r="{size}" cx="{x:.1f}" cy="{y:.1f}"/>'
        for kind, size, group in (("other", 3, points), ("bar", 5, unbeaten))
        for x, y in map(place, group)
    )
    axis = HEIGHT - MARGIN
    lines = f'<path d="M{MARGIN} {MARGIN}V{axis}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>'
    texts = (
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 15}" text-anchor="middle">tok/s a user, up to '
        f'{short(most[0])}</text><text x="{MARGIN}" y="{MARGIN - 15}">tok/s a GPU, up to '
        f"{short(most[1])}</text>"
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{lines}{dots}{texts}</svg>'


def _bars(parts: dict[str, float]) -> str:
    """Milliseconds by part, largest first."""
    shown = sorted(((k, v) for k, v in parts.items() if v > 0), key=lambda pair: -pair[1])
    most = shown[0][1]
    lines = [
        f'<text x="0" y="{22 * i + 15}">{_text(name)}</text><rect class="bar" x="150" '
        f'y="{22 * i + 3}" height="16" width="{360 * seconds / most:.1f}"/><text x="'
        f'{160 + 360 * seconds / most:.1f}" y="{22 * i + 15}">{seconds * 1e3:.3g} ms</text>'
        for i, (name, seconds) in enumerate(shown)
    ]
    return f'<svg viewBox="0 0 {WIDTH} {22 * len(shown) + 6}" role="img">{"".join(lines)}</svg>'
