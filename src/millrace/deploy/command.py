"""`millrace deploy`: a fleet on a cluster or a machine from one file.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from millrace.deploy.layout.layout import Layout

_FILE = click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False), default="deploy.yaml"
)


@click.group()
def deploy() -> None:
    """Render, check and follow a fleet that FILE (deploy.yaml) describes."""


@deploy.command()
@_FILE
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, file_okay=False), default=Path("rendered"),
    show_default=True, help="Folder for the files; one that was rendered before is written anew.",
)  # fmt: skip
def render(file: Path, output: Path) -> None:
    """Write what FILE describes: Kustomize folders, scripts, images, and a guide with costs."""
    from millrace.deploy.bundle import render, write

    layout = _layout(file)
    files = render(layout)
    write(files, output)
    for note in layout.settings.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{len(files)} files in {output}; {output / 'README.md'} says what to do")


_CONTEXT = click.option("--context", help="Of kubectl's configuration [the current one].")


@deploy.command()
@_FILE
@_CONTEXT
@click.option(
    "--json", "json_file", type=click.Path(allow_dash=True, path_type=Path),
    help="Also write the findings to this file, as JSON; - writes JSON to stdout instead of text.",
)  # fmt: skip
@click.pass_context
def check(ctx: click.Context, file: Path, context: str | None, json_file: Path | None) -> None:
    """Say what the cluster lacks for FILE, each with the command that mends it.

    The exit status is 1 if something keeps the fleet from running.
    """
    from rich.console import Console

    from millrace.deploy.check.cluster import Cluster
    from millrace.deploy.check.run import check_cluster
    from millrace.doctor.finding import show, write_report

    layout = _layout(file, "check")
    cluster = Cluster(context)
    try:
        findings = check_cluster(cluster, layout)
    finally:
        cluster.close()
    ok = all(one.verdict != "fail" for one in findings)
    if str(json_file) != "-":
        show(findings, Console(highlight=False))
    write_report({"ok": ok, "findings": findings}, json_file)
    ctx.exit(0 if ok else 1)


@deploy.command()
@_FILE
@_CONTEXT
@click.option("--once", is_flag=True, help="Print the state and end.")
@click.option(
    "--timeout", type=float, default=4200.0, show_default=True, help="Seconds to wait at most."
)
def status(file: Path, context: str | None, once: bool, timeout: float) -> None:
    """Follow the rollout of FILE until every pod is ready, and say what keeps it."""
    from millrace.deploy.check.cluster import Cluster
    from millrace.deploy.check.status import follow, lines

    layout = _layout(file, "status")
    cluster = Cluster(context)
    try:
        if once:
            for name, text in lines(cluster, layout):
                click.echo(f"{name}: {text}")
        else:
            follow(cluster, layout, click.echo, timeout=timeout)
    finally:
        cluster.close()


def _layout(file: Path, command: str = "") -> Layout:
    """What FILE means. command: one that needs a cluster."""
    from millrace.deploy.layout.deploy_file import read_deploy_file
    from millrace.deploy.layout.layout import layout_of
    from millrace.deploy.layout.settings import settle
    from millrace.errors import ConfigError

    content = read_deploy_file(file)
    if command and content.platform == "machine":
        raise ConfigError(f"deploy {command}: a machine is no cluster; `millrace doctor` checks it")
    return layout_of(content, settle(content))
