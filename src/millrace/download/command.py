"""The options of `millrace download`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from millrace.errors import UserError


@click.command("download", help="Download a model; what stopped a download before, it goes on.")
@click.argument("model", required=False, metavar="MODEL[@REVISION]")
@click.option("--revision", help="Branch, tag or commit [main].")
@click.option("--include", multiple=True, help="Only files that match, as *.json; repeatable.")
@click.option("--exclude", multiple=True, help="No files that match; repeatable.")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="The cache of Hugging Face's tools [HF_HUB_CACHE, or hub in HF_HOME].",
)
@click.option(
    "--local-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="A directory that gets the files under their names, instead of the cache.",
)
@click.option("--endpoint", help="A mirror of the hub [HF_ENDPOINT].")
@click.option("--token", help="Of the hub [HF_TOKEN, or what hf auth login stored].")
@click.option(
    "--max-workers", type=click.IntRange(1, 64), default=8, show_default=True, help="Connections."
)
@click.option("--force-download", is_flag=True, help="Fetch files again that are there.")
@click.option("--dry-run", is_flag=True, help="List the files and their sizes; fetch nothing.")
@click.option("--quiet", is_flag=True, help="No progress; only the directory, at the end.")
@click.option(
    "--verify",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Read a downloaded model again and compare its digests; exit with 1 when one differs.",
)
def download(**options: Any) -> None:
    from millrace.download.run import Request, run, run_verify

    verify: Path | None = options.pop("verify")
    model: str | None = options.pop("model")
    if (model is None) == (verify is None):
        raise UserError("name a model, as Qwen/Qwen3.5-27B-FP8, or give --verify DIR")
    if verify is not None:
        raise SystemExit(run_verify(verify, quiet=options["quiet"]))
    run(Request(model=str(model), **options))
