"""One evaluation: held-out items are answered, graded, printed and written.

Models, grading, statistics and files are for other modules.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from millrace.errors import UserError
from millrace.eval.models import Endpoint, GenerationOptions, InProcess, Model
from millrace.eval.results import (
    Answer,
    compare_results,
    comparison_table,
    summarise,
    summary_table,
    write_results,
)
from millrace.tasks import TASKS, Item, find_task, make_items

OnAnswer = Callable[[Answer], None]


def make_all(tasks: Sequence[str], count: int, seed: int) -> list[Item]:
    """`count` held-out items of each task."""
    return [item for task in tasks for item in make_items(task, count, seed)]


def run_items(
    model: Model,
    items: Sequence[Item],
    options: GenerationOptions,
    on_answer: OnAnswer | None = None,
) -> list[Answer]:
    """Have every item answered and graded; the answers are in the order of the items."""
    answers: list[Answer | None] = [None] * len(items)
    for completion in model.generate(items, options):
        item = items[completion.index]
        text = completion.text  # "" after an error
        grade = find_task(item.task).grade(item, text)
        seconds, tokens, error = completion.seconds, completion.tokens, completion.error
        answer = Answer(item, text, grade, seconds, tokens, error)
        answers[completion.index] = answer
        if on_answer:
            on_answer(answer)
    return [answer for answer in answers if answer is not None]


def _with_progress(
    console: Console, model: Model, items: Sequence[Item], options: GenerationOptions
) -> list[Answer]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(f"asking {model.name}", total=len(items))
        right = wrong = 0

        def on_answer(answer: Answer) -> None:
            nonlocal right, wrong
            right, wrong = right + answer.grade.correct, wrong + (not answer.grade.correct)
            progress.update(bar, advance=1, description=f"{right} right, {wrong} wrong")

        return run_items(model, items, options, on_answer)


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
        raise UserError(f"--tasks {text!r} names no task; use any of {', '.join(TASKS)}")
    for name in names:
        find_task(name)
    return list(dict.fromkeys(names))


def compare_files(paths: tuple[Path, Path]) -> None:
    """Print the comparison of two result files, item by item."""
    paired = compare_results(*paths)
    Console().print(comparison_table((paths[0].name, paths[1].name), paired))


def evaluate(options: dict[str, Any]) -> int:
    """Run the tasks, print and write the results; returns the exit code."""
    console = Console()
    tasks = _tasks(options["tasks"])
    path = options["json_path"]
    if path and not path.parent.is_dir():
        raise UserError(
            f"--json {path}: the directory {path.parent} does not exist; create it first"
        )
    model = _model(options)
    generation = GenerationOptions(
        options["temperature"], options["max_tokens"], options["thinking"]
    )
    items = make_all(tasks, options["num_items"], options["seed"])
    began = time.perf_counter()
    answers = _with_progress(console, model, items, generation)
    seconds = time.perf_counter() - began
    summaries = summarise(answers)
    console.print(summary_table(summaries))
    tokens = sum(answer.tokens for answer in answers)
    console.print(f"{len(answers)} items, {tokens} tokens in {seconds:.1f} s")
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        console.print(f"{len(errors)} items got no answer; the first: {errors[0]}")
    if path:
        write_results(path, _run_fields(model, options, seconds), answers)
    worst = min(summary.items.share for summary in summaries.values())
    minimum = options["min_accuracy"]
    if minimum is not None and worst < minimum:
        console.print(f"accuracy {worst:.4f} is below --min-accuracy {minimum}")
        return 1
    return 1 if len(errors) == len(answers) else 0


def _run_fields(model: Model, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """How a run was made, for its result file."""
    kept = ("base_url", "tasks", "num_items", "seed", "temperature", "max_tokens", "thinking")
    run = {name: options[name] for name in (*kept, "concurrency")}
    return {"model": model.name, **run, "seconds": round(seconds, 3)}
