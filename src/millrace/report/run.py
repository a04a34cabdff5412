"""A report from beginning to end: steps that are not done yet, then its two files."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from millrace.about import commit
from millrace.bench.load.interrupts import InterruptedRunError, Interrupts
from millrace.errors import UserError
from millrace.report.html import report_html
from millrace.report.plan import SECTIONS, Request, shown_server, steps_of
from millrace.report.steps.document import ModelRecord, Report, StepRecord, sealed
from millrace.report.steps.hashes import Hashed, installed, model_files, package_files, plain
from millrace.report.steps.journal import Journal, write_whole
from millrace.report.steps.serving import Servers
from millrace.report.steps.step import AbsentError, Place, Step
from millrace.report.summary import summary_of
from millrace.version import __version__

FAILED = 1
JSON_FILE, HTML_FILE = "report.json", "report.html"


class Estimate(msgspec.Struct, frozen=True):
    """Seconds that steps take, and how many starts of servers are in them."""

    seconds: float
    starts: int

    def __str__(self) -> str:
        minutes = self.seconds / 60
        return f"{minutes:.0f} minutes" if minutes >= 2 else f"{self.seconds:.0f} seconds"


def estimate(steps: Sequence[Step], request: Request) -> Estimate:
    """A guess, from sizes and the profile's rates."""
    starts, before = 0, None
    for step in steps:
        if step.serving is not None and step.serving != before:
            starts, before = starts + 1, step.serving
    seconds = sum(step.seconds for step in steps) + starts * request.profile.start
    return Estimate(seconds, starts)


def make_report(request: Request, directory: Path, *, start_limit: float) -> int:
    """Do what is left to do, and write the files; the exit status. Raises UserError."""
    steps = steps_of(request)
    say("hashing the model's and the package's files")
    hashed = model_files(request.model.directory), package_files()
    with Journal(directory) as journal:
        header = {
            "model": hashed[0].sha256,
            "package": hashed[1].sha256,
            "profile": plain(request.profile),
            "serve_arguments": list(request.serve_arguments),
        }
        if journal.begin(header):
            say(f"{directory}: steps that are done there are kept")
        with Interrupts() as interrupts:

            async def main(stop: asyncio.Event) -> bool:
                return await _do(steps, request, journal, start_limit, stop)

            finished = interrupts.run(main)
        if not finished:
            say("interrupted; the same command goes on")
            return interrupts.status or FAILED
        records = [
            record
            for step in _every_step(request)
            if (record := journal.read(step.name)) is not None
        ]
        report = _report(request, hashed, records)
        _write(directory, report)
    failed = [record for record in report.steps if record.status == "failed"]
    for record in failed:
        say(f"failed: {record.name}: {record.reason}")
    return FAILED if failed else 0


def _every_step(request: Request) -> list[Step]:
    """Also those of sections that another call has done in the same directory."""
    sections = [name for name in SECTIONS if name != "versus" or request.peers]
    return steps_of(msgspec.structs.replace(request, sections=sections))


async def _do(
    steps: Sequence[Step],
    request: Request,
    journal: Journal,
    start_limit: float,
    stop: asyncio.Event,
) -> bool:
    """All steps that are left; whether they came to their end."""
    left = [step for step in steps if not _is_done(step, request, journal)]
    expected = estimate(left, request)
    say(f"{len(left)} of {len(steps)} steps to do, about {expected}")
    try:
        async with Servers(journal.directory / "logs", start_limit, stop) as servers:
            for number, step in enumerate(left, 1):
                say(f"[{number}/{len(left)}] {step.name}")
                record = await _step(step, request, journal, servers, start_limit, stop)
                if record.status != "done":
                    say(f"  {record.status}: {record.reason}")
    except InterruptedRunError:
        return False
    return True


def _is_done(step: Step, request: Request, journal: Journal) -> bool:
    """Whether a step was done with the same server and the same load."""
    found = journal.read(step.name)
    server = shown_server(step.serving, request.model, request.serve_program)
    return (
        found is not None
        and found.status == "done"
        and found.command == list(step.command)
        and found.server == server
    )


async def _step(
    step: Step,
    request: Request,
    journal: Journal,
    servers: Servers,
    start_limit: float,
    stop: asyncio.Event,
) -> StepRecord:
    """Do one step and keep what came of it."""
    began, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    load = round(os.getloadavg()[0], 2)
    status, reason, result = "done", "", None
    try:
        for name in step.needs:
            before = journal.read(name)
            if before is None or before.status != "done":
                raise AbsentError(f"{name}, which it needs, was not done")
        if step.serving is None:
            await servers.end()
        target = None if step.serving is None else await servers.get(step.serving)
        place = Place(
            target=target, directory=journal.directory, model=request.model,
            profile=request.profile, stop=stop, start_limit=start_limit, say=say,
        )  # fmt: skip
        result = plain(await step.work(place))
    except AbsentError as error:
        status, reason = "absent", str(error)
    except (UserError, OSError) as error:
        status, reason = "failed", " ".join(f"{error or type(error).__name__}".split())
        reason += servers.problem()
    record = StepRecord(
        name=step.name,
        section=step.section,
        status=status,  # type: ignore[arg-type]
        server=shown_server(step.serving, request.model, request.serve_program),
        command=list(step.command),
        reason=reason,
        result=result,
        began=began,
        seconds=round(time.monotonic() - clock, 3),
        load_average=load,
    )
    return journal.write(record)


def _report(request: Request, hashed: tuple[Hashed, Hashed], records: list[StepRecord]) -> Report:
    profile: dict[str, Any] = plain(request.profile)
    return sealed(
        Report(
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            millrace=__version__,
            commit=commit(),
            profile=profile,
            serve_arguments=list(request.serve_arguments),
            model=ModelRecord(name=request.model.name, files=hashed[0]),
            package=hashed[1],
            installed=installed(),
            steps=records,
            summary=plain(summary_of(records)),
        )
    )


def _write(directory: Path, report: Report) -> None:
    json_file, html_file = directory / JSON_FILE, directory / HTML_FILE
    write_whole(json_file, msgspec.json.format(msgspec.json.encode(report)))
    write_whole(html_file, report_html(report).encode())
    click.echo(f"written to {json_file} and {html_file}")
    click.echo(f"sha256 of the report: {report.sha256}")


def say(line: str) -> None:
    """A line on stderr."""
    click.echo(line, err=True)
