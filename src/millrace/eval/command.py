"""`millrace eval`: asks a model held-out items with known answers and says how many were right.

The command's options and its output; asking, grading and statistics are their own modules'.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from millrace.errors import UserError
from millrace.eval.ask import Endpoint, InProcess, Model, Request
from millrace.eval.results import (
    Answer,
    compare_results,
    comparison_table,
    summarise,
    summary_table,
    write_results,
)
from millrace.tasks import TASKS, Item, find_task, make_items

Answered = Callable[[Answer], None]


def make_all(tasks: Sequence[str], count: int, seed: int) -> list[Item]:
    """`count` held-out items of each task."""
    return [item for task in tasks for item in make_items(task, count, seed)]


def run_items(
    model: Model, items: Sequence[Item], request: Request, answered: Answered | None = None
) -> list[Answer]:
    """Asks and grades every item; the answers are in the items' order."""
    answers: list[Answer | None] = [None] * len(items)
    for said in model.ask(items, request):
        item = items[said.index]
        grade = find_task(item.task).grade(item, said.text)  # of "" where there was an error
        answer = Answer(item, said.text, grade, said.seconds, said.tokens, said.error)
        answers[said.index] = answer
        if answered:
            answered(answer)
    return [answer for answer in answers if answer is not None]


def _with_progress(
    console: Console, model: Model, items: Sequence[Item], request: Request
) -> list[Answer]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(f"asking {model.name}", total=len(items))
        right = wrong = 0

        def answered(answer: Answer) -> None:
            nonlocal right, wrong
            right, wrong = right + answer.grade.correct, wrong + (not answer.grade.correct)
            progress.update(bar, advance=1, description=f"{right} right, {wrong} wrong")

        return run_items(model, items, request, answered)


def _model(options: dict[str, Any]) -> Model:
    """The model that the options name: exactly one of an endpoint and a directory."""
    base_url, directory = options["base_url"], options["model"]
    if bool(base_url) == bool(directory):
        raise UserError("give either --base-url (a server) or --model (a directory or a name)")
    if base_url:
        key = os.environ.get("OPENAI_API_KEY")
        return Endpoint(base_url, options["served_model_name"], key, options["concurrency"])
    if options["served_model_name"]:
        raise UserError("--served-model-name is an endpoint's; give it with --base-url")
    return InProcess(directory, options["concurrency"])


def _tasks(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {text!r} names no task; there are {', '.join(TASKS)}")
    for name in names:
        find_task(name)
    return list(dict.fromkeys(names))


def _compare(console: Console, paths: tuple[Path, Path]) -> None:
    paired = compare_results(*paths)
    console.print(comparison_table((paths[0].name, paths[1].name), paired))


def _evaluate(console: Console, options: dict[str, Any]) -> int:
    """Runs the tasks, prints and writes what was found; returns the exit code."""
    tasks = _tasks(options["tasks"])
    path = options["json_path"]
    if path and not path.parent.is_dir():
        raise UserError(f"--json {path}: {path.parent} is no directory; create it first")
    model = _model(options)
    request = Request(options["temperature"], options["max_tokens"], options["thinking"])
    items = make_all(tasks, options["num_items"], options["seed"])
    began = time.perf_counter()
    answers = _with_progress(console, model, items, request)
    seconds = time.perf_counter() - began
    summaries = summarise(answers)
    console.print(summary_table(summaries))
    tokens = sum(answer.tokens for answer in answers)
    console.print(f"{len(answers)} items, {tokens} tokens in {seconds:.1f} s")
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        console.print(f"{len(errors)} items got no answer; the first: {errors[0]}")
    if path:
        write_results(path, _run(model, options, seconds), answers)
    worst = min(summary.items.share for summary in summaries.values())
    minimum = options["min_accuracy"]
    if minimum is not None and worst < minimum:
        console.print(f"accuracy {worst:.4f} is below --min-accuracy {minimum}")
        return 1
    return 1 if len(errors) == len(answers) else 0


def _run(model: Model, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What a result file says of how it was made."""
    kept = ("base_url", "tasks", "num_items", "seed", "temperature", "max_tokens", "thinking")
    run = {name: options[name] for name in (*kept, "concurrency")}
    return {"model": model.name, **run, "seconds": round(seconds, 3)}


@click.command("eval", help="Ask a model held-out items with known answers; count what is right.")
@click.option("--base-url", help="An OpenAI-compatible server, as http://127.0.0.1:8000/v1.")
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
    console = Console(stderr=False)
    try:
        if options["compare"]:
            _compare(console, options["compare"])
            return
        code = _evaluate(console, options)
    except UserError as error:
        click.echo(f"millrace eval: {error}", err=True)
        sys.exit(2)
    if code:
        sys.exit(code)
