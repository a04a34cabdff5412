"""The options of `millrace eval`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from millrace.errors import UserError
from millrace.tasks import TASKS


@click.command("eval", help="Measure a model's accuracy on held-out items with known answers.")
@click.option(
    "--base-url",
    help="An OpenAI-compatible server: http://127.0.0.1:8000, or with /v1.",
)
@click.option("--model", help="A model directory, or the name of a model that ships, run here.")
@click.option("--served-model-name", help="The model's name at the server [the first it lists].")
@click.option("--tasks", default="policy,math", show_default=True, help=f"Of {', '.join(TASKS)}.")
@click.option(
    "--num-items",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Items of each task.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which held-out items.")
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests in flight; in-process, sequences in the batch.",
)
@click.option("--max-tokens", type=click.IntRange(1), help="[each task's own]")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option(
    "--thinking/--no-thinking",
    default=True,
    show_default=True,
    help="Whether the chat template opens a <think> part.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write every item's answer and the summary here.",
)
@click.option(
    "--min-accuracy",
    type=click.FloatRange(0, 1),
    help="Exit with 1 when a task's share of right items is lower.",
)
@click.option("--compare", nargs=2, type=click.Path(path_type=Path), metavar="A.json B.json",
              help="Compare two result files item by item, and ask no model.")  # fmt: skip
def eval_command(**options: Any) -> None:
    from millrace.eval.evaluation import compare_files, evaluate

    try:
        if options["compare"]:
            compare_files(options["compare"])
            return
        code = evaluate(options)
    except UserError as error:
        click.echo(f"millrace eval: {error}", err=True)
        sys.exit(2)
    if code:
        sys.exit(code)
