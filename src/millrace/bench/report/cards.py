"""The cards at the head of a report: what a reader wants to know before anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from millrace.bench.report.host_tables import accuracy_of, best_of
from millrace.bench.report.loads import Load
from millrace.bench.report.page import Card, CardLine, figure_text
from millrace.bench.report.results import ResultFile

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}
_OF_LOADS = ("Best under", "Energy")  # what files of started servers cannot tell
_WITHOUT = {"Energy": "no power was read", "Accuracy": "measured with --accuracy"}
_NOT_ASKED = CardLine("not asked", "millrace bench report DIRECTORY --goodput ttft:500 tpot:50")


def cards_of(
    sets: Mapping[str, Sequence[ResultFile]],
    loads: Sequence[Load],
    objectives: Mapping[str, float],
) -> list[Card]:
    """The cards of some sets of runs. objectives: milliseconds by latency."""

    def each(line: Callable[[str], CardLine | None]) -> list[CardLine]:
        return [found for name in sets if (found := line(name)) is not None]

    def of(name: str) -> list[Load]:
        return [load for load in loads if load.name == name]

    under = " and ".join(f"{_NAMES[n]} p99 ≤ {limit:g} ms" for n, limit in objectives.items())
    asked = [_NOT_ASKED] if loads else []
    limited = each(lambda name: _best_under(name, of(name), objectives)) if objectives else []
    cards = [
        Card(
            "Best throughput",
            [*each(lambda name: _best(name, of(name))), *each(lambda n: _best_host(n, sets[n]))],
        ),
        Card(f"Best under {under or 'an objective'}", limited or asked),
        Card("Energy", each(lambda name: _energy(name, of(name)))),
        Card("Accuracy", [line for name in sets for line in _accuracy(name, sets[name])]),
        Card("Machine", each(lambda name: _machine(name, sets[name]))),
        Card("Measured", each(lambda name: _date(name, sets[name]))),
    ]
    return [
        card if card.lines else Card(card.title, [CardLine("n/a", _WITHOUT.get(card.title, ""))])
        for card in cards
        if card.lines or loads or not card.title.startswith(_OF_LOADS)
    ]


def objectives_of(results: Sequence[ResultFile]) -> dict[str, float]:
    """The objectives that every run had; none where they differ."""
    known = [run.fields.get("objectives") or {} for run in results if run.is_run]
    return dict(known[0]) if known and all(one == known[0] for one in known) else {}


def best_load(loads: Sequence[Load]) -> Load | None:
    """The load with the highest throughput, a valid one if there is any."""
    among = [load for load in loads if load.valid] or list(loads)
    return max(among, key=_throughput, default=None)


def meets(load: Load, objectives: Mapping[str, float]) -> bool:
    """Whether the load's 99th percentiles, median of the repeats, are within the objectives."""
    spreads = {name: load.spread(f"p99_{name}_ms") for name in objectives}
    return all(found and found.median <= objectives[name] for name, found in spreads.items())


def _throughput(load: Load) -> float:
    found = load.spread("total_token_throughput")
    return found.median if found else 0.0


def _line(name: str, load: Load) -> CardLine:
    mark = "" if load.valid else ", not a valid run"
    return CardLine(f"{_throughput(load):,.0f} tok/s", f"{load.label}{mark}", name)


def _best(name: str, loads: Sequence[Load]) -> CardLine | None:
    found = best_load(loads)
    return _line(name, found) if found else None


def _best_host(name: str, results: Sequence[ResultFile]) -> CardLine | None:
    """Of the files whose servers the command started."""
    rows = [found for run in results if not run.is_run and (found := best_of(run)) is not None]
    if not rows:
        return None
    best, label = max(rows)
    return CardLine(f"{best:,.0f} tok/s", label, name)


def _best_under(
    name: str, loads: Sequence[Load], objectives: Mapping[str, float]
) -> CardLine | None:
    if not loads:
        return None
    within = [load for load in loads if meets(load, objectives)]
    found = best_load(within)
    return _line(name, found) if found else CardLine("none", "no load is within it", name)


def _energy(name: str, loads: Sequence[Load]) -> CardLine | None:
    """Joules a token at the best throughput."""
    load = best_load(loads)
    found = load.spread("joules_per_token") if load else None
    if load is None or found is None:
        return None
    return CardLine(f"{figure_text(found.median)} J / token", load.label, name)


def _accuracy(name: str, results: Sequence[ResultFile]) -> list[CardLine]:
    """The lowest accuracy of each task."""
    lowest: dict[str, Mapping[str, Any]] = {}
    for run in results:
        for task, found in (run.fields.get("accuracy") or {}).items():
            if task not in lowest or (found["value"] or 0.0) < (lowest[task]["value"] or 0.0):
                lowest[task] = found
    lines = [CardLine(str(found["text"]), task, name) for task, found in lowest.items()]
    hosts = [value for run in results if not run.is_run and (value := accuracy_of(run)) is not None]
    if hosts:
        lines.append(CardLine(f"{min(hosts):.1%}", "the lowest of all servers started", name))
    return lines


def _machine(name: str, results: Sequence[ResultFile]) -> CardLine | None:
    origin = _last(results, "provenance")
    gpus = list(_last(results, "server").get("gpus") or [])
    processor = f"{origin.get('processor', '')}, {origin.get('cores', '?')} cores"
    if not gpus:
        return CardLine(processor, "the load generator's machine", name) if origin else None
    kinds = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
    return CardLine(kinds, processor if origin else "", name)


def _last(results: Sequence[ResultFile], part: str) -> dict[str, Any]:
    return next((found for run in reversed(results) if (found := run.fields.get(part))), {})


def _date(name: str, results: Sequence[ResultFile]) -> CardLine | None:
    """The first and the last day, the number of runs, the version of the server."""
    dates = sorted(str(run.fields["date"]) for run in results if run.fields.get("date"))
    if not dates:
        return None
    days = sorted({f"{d[:4]}-{d[4:6]}-{d[6:8]}" for d in dates})
    origin = _last(results, "provenance")
    version = origin.get("server_version") or ""
    count = f"{len(results)} run{'s' if len(results) > 1 else ''}"
    detail = f"{count}, server {version}" if version else count
    return CardLine(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}", detail, name)
