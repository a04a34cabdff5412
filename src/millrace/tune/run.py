"""A study from beginning to end: begun, gone on with, shown; files are written as it goes."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

import click
import msgspec

from millrace.bench.load.interrupts import InterruptedRunError, Interrupts
from millrace.bench.report.save import write_json
from millrace.common.optional import require
from millrace.errors import ConfigError
from millrace.tune.html_report import report_html
from millrace.tune.request import Prepared, Request, fields_of, prepare, request_from
from millrace.tune.results import Results, results_of
from millrace.tune.search.study import Rules, run_study
from millrace.tune.servers.command_line import Served, engine_words, fleet_content
from millrace.tune.space.knobs import label, replicas_of
from millrace.tune.text_report import UNITS, text_of, visit_line
from millrace.tune.trials.history import History
from millrace.tune.trials.journal import Abandoned, Header, Journal, read_journal
from millrace.tune.trials.outcome import Outcome, Visit

FAILED = 1
_PORT = 8000


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """What a header tells: rules and request."""

    request: Request
    served: Served
    rules: Rules


def begin(request: Request) -> int:
    """Begin a study; the exit status. Raises UserError, also if there is one in the directory."""
    require("optuna", "millrace tune")
    prepared = prepare(request)
    directory = Path(request.flags.dir)
    with Journal(directory) as journal:
        if journal.records:
            raise ConfigError(
                f"{directory} has a study; `millrace tune resume {directory}` goes on with it, or "
                "give another --dir"
            )
        content = {
            "request": fields_of(request),
            "served": msgspec.to_builtins(prepared.served),
            "rules": msgspec.to_builtins(prepared.rules),
        }
        journal.write(Header(space=prepared.space, request=content))
        return _study(journal, prepared)


def go_on(directory: Path) -> int:
    """Go on with the study in a directory; the exit status. Raises UserError for none."""
    require("optuna", "millrace tune")
    read_journal(directory)
    with Journal(directory) as journal:
        header, study = _header(journal.records[0])
        flags = msgspec.structs.replace(study.request.flags, dir=str(directory.resolve()))
        request = msgspec.structs.replace(study.request, flags=flags)
        # The space and the rules of the beginning hold, also if the machine has changed since.
        prepared = msgspec.structs.replace(
            prepare(request), space=header.space, rules=study.rules, served=study.served
        )
        return _study(journal, prepared)


def shown(directory: Path, *, as_json: bool) -> str:
    """What a study found so far, as text or JSON. Raises UserError for none."""
    require("optuna", "millrace tune")
    records = read_journal(directory)
    header, study = _header(records[0])
    history = History(header.space, study.rules.goal, records)
    finished = (directory / "results.json").exists()
    results = results_of(history, header.space, study.served, finished=finished)
    if as_json:
        return msgspec.json.format(msgspec.json.encode(results)).decode()
    return text_of(results)


def _header(record: object) -> tuple[Header, Study]:
    assert isinstance(record, Header)
    try:
        return record, msgspec.convert(record.request, Study)
    except msgspec.ValidationError:
        request_from(record.request.get("request", {}))  # says what is wrong, where it is that
        raise ConfigError("the study's journal has no request that this version reads") from None


def _study(journal: Journal, prepared: Prepared) -> int:
    rules, space = prepared.rules, prepared.space
    history = History(space, rules.goal, journal.records)
    say = _Sayer(history, rules)
    with Interrupts() as interrupts:

        async def main(stop: asyncio.Event) -> bool:
            try:
                await run_study(journal, history, rules, prepared.target(stop), say.visit)
            except InterruptedRunError:
                _abandon(journal, history)
                return False
            return True

        finished = interrupts.run(main)
    results = results_of(history, space, prepared.served, finished=finished)
    click.echo(text_of(results))
    _write(Path(prepared.request.flags.dir), prepared, history, results)
    if interrupts.status:
        click.echo(f"go on with: millrace tune resume {prepared.request.flags.dir}", err=True)
        return interrupts.status
    return 0 if results.verdict is not None else FAILED


def _abandon(journal: Journal, history: History) -> None:
    """Note that a visit was ended in good order, and is to begin anew."""
    if history.open is not None:
        record = Abandoned(history.open[0].number)
        journal.write(record)
        history.add(record)


class _Sayer:
    """Lines on stderr while a study goes on."""

    def __init__(self, history: History, rules: Rules) -> None:
        self._history = history
        self._unit = UNITS[rules.goal.objective]

    def visit(self, visit: Visit, outcome: Outcome | None) -> None:
        history = self._history
        value = 0.0
        if outcome is not None and outcome.runs:
            value = statistics.median(history.values(history.trials[visit.trial], outcome))
        name = label(history.space, visit.settings)
        click.echo(visit_line(visit, name, outcome, self._unit, value), err=True)


def _write(directory: Path, prepared: Prepared, history: History, results: Results) -> None:
    """The files of a study: report, results, and the configuration of the best."""
    files = [_write_text(directory / "report.html", report_html(results))]
    if results.verdict is not None:
        settings = history.trials[results.verdict.best].settings
        files.append(write_json(directory / "best.yaml", results.options))  # JSON is YAML
        if results.drafts is not None:
            files.append(write_json(directory / "best-drafts.yaml", results.drafts.options))
        if replicas_of(settings) > 1:
            served = msgspec.structs.replace(prepared.served, of_trials=())
            words = engine_words(served, prepared.space, settings)
            content = fleet_content(words, prepared.space, settings, _PORT)
            files.append(write_json(directory / "best-fleet.yaml", content))
    if results.finished:
        files.append(write_json(directory / "results.json", results))
    click.echo("written to " + ", ".join(str(path) for path in files))


def _write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
