"""`millrace deploy`: a fleet on a cluster or a machine from one file.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from pathlib import Path

import click

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
    from millrace.deploy.layout.deploy_file import read_deploy_file
    from millrace.deploy.layout.layout import layout_of
    from millrace.deploy.layout.settings import settle

    content = read_deploy_file(file)
    layout = layout_of(content, settle(content))
    files = render(layout)
    write(files, output)
    for note in layout.settings.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{len(files)} files in {output}; {output / 'README.md'} says what to do")
