"""The options of `millrace observe`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from pathlib import Path

import click

from millrace.errors import UserError
from millrace.target import Target, parse_url


@click.command(
    "observe", help="Sample engines, gateways, exporters and this host; keep and report."
)
@click.option(
    "--targets",
    "-t",
    multiple=True,
    metavar="URL[,URL...]",
    help="Engines, gateways, exporters of DCGM, AMD or nodes; repeatable.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where samples go.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 60.0), default=1.0, show_default=True, help="Seconds."
)
@click.option(
    "--duration", type=click.FloatRange(0.0), default=0.0, help="Seconds; 0: until Ctrl-C."
)
@click.option("--host/--no-host", default=True, help="Sample this machine too [yes].")
@click.option("--mark", metavar="PHASE", help="Write that a phase begins in --out, and exit.")
@click.option("--report", is_flag=True, help="Write report.html of what is in --out, and exit.")
@click.option(
    "--write-rules",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write rules for Prometheus and dashboards for Grafana, and exit.",
)
def observe(
    targets: tuple[str, ...],
    out: Path | None,
    interval: float,
    duration: float,
    host: bool,
    mark: str | None,
    report: bool,
    write_rules: Path | None,
) -> None:
    if write_rules is not None:
        _write_rules(write_rules)
        return
    if out is None:
        raise UserError("give --out DIR, where samples go")
    if mark is not None:
        _mark(out, mark)
    elif report:
        _report(out)
    else:
        found = [
            parse_url(url.strip()) for text in targets for url in text.split(",") if url.strip()
        ]
        if not found and not host:
            raise UserError("give --targets URL, or leave out --no-host")
        _run(found, out, host=host, interval=interval, duration=duration)
        _report(out)


def _run(targets: list[Target], out: Path, *, host: bool, interval: float, duration: float) -> None:
    from millrace.observe.observer import Observer
    from millrace.observe.samples.host import Host
    from millrace.observe.samples.store import Store

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    store = Store(out)
    if store.suffix != "parquet":
        click.echo(
            "pyarrow is not installed: samples are JSON lines; pip install 'millrace[bench]'"
        )
    observer = Observer(targets, store, host=Host() if host else None, interval=interval)
    for problem in Host().problems if host else []:
        click.echo(problem)
    click.echo(f"sampling {len(targets)} targets into {out}; Ctrl-C ends it")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, observer.stop)
        await observer.run(duration)

    asyncio.run(run())


def _mark(out: Path, phase: str) -> None:
    from millrace.observe.samples.store import mark

    if not out.is_dir():
        raise UserError(f"--out {out}: no such directory; start `millrace observe` first")
    mark(out, time.time(), phase)


def _report(out: Path) -> None:
    from millrace.observe.report.findings import contradictions, walls
    from millrace.observe.report.page import write_report

    target, found = write_report(out)
    for one in found:
        click.echo(f"{one.phase.name}, {one.phase.end - one.phase.start:.0f} s:")
        for line in (*walls(one), *contradictions(one)):
            click.echo(f"  {line}")
    click.echo(f"report: {target}")


def _write_rules(directory: Path) -> None:
    from millrace.observe.dashboards import DASHBOARDS, document
    from millrace.observe.rules import rule_files

    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in rule_files().items():
            (directory / name).write_text(text)
        for dashboard in DASHBOARDS:
            shown = json.dumps(document(dashboard), indent=1)
            (directory / f"grafana-{dashboard.name}.json").write_text(shown)
    except OSError as error:
        raise UserError(f"--write-rules {directory}: {error.strerror}") from None
    click.echo(f"{directory}: recording.yml, alerts.yml, {len(DASHBOARDS)} dashboards")
