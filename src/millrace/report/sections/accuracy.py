"""Accuracy: our own tasks by `millrace eval`, and lm-evaluation-harness where it is installed.

The answers are kept with their grades, so that a reader can grade them again.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.load.interrupts import unless_stopped
from millrace.bench.runs.accuracy import EVALUATION
from millrace.common.child_process import (
    child_environment,
    end_with_parent,
    kill_group,
    kill_process,
)
from millrace.errors import UserError
from millrace.report.steps.profiles import Profile
from millrace.report.steps.step import AbsentError, ModelFacts, Place, Serving, Step

_LIMIT = 4 * 3600.0  # seconds of one evaluation
_MOST_LINES = 20
_TOKENS = {"policy": 500, "math": 120, "instructions": 300}  # of an item, for the estimate
TASKS = tuple(_TOKENS)
_CONCURRENCY = 32


def task_steps(profile: Profile, serving: Serving) -> list[Step]:
    """A step for each of our own tasks."""
    return [_task_step(task, profile, serving) for task in TASKS]


def _task_step(task: str, profile: Profile, serving: Serving) -> Step:
    items = profile.instructions if task == "instructions" else profile.items
    words = [
        *("--tasks", task, "--num-items", str(items), "--seed", "0"),
        *("--concurrency", str(_CONCURRENCY)),
    ]

    async def work(place: Place) -> Any:
        file = place.folder("accuracy") / f"{task}.json"
        own = ["--json", str(file)]
        await run_child([*EVALUATION, "--base-url", place.url, *words, *own], place)
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        return {"seed": 0, "summary": found["summary"][task], "items": found["items"]}

    return Step(
        name=f"accuracy/{task}",
        section="accuracy",
        seconds=items * _TOKENS[task] / profile.rate + 2.0,
        work=work,
        command=("millrace", "eval", "--base-url", "URL", *words),
        serving=serving,
    )


async def run_child(
    command: Sequence[str], place: Place, environment: dict[str, str] | None = None
) -> str:
    """Run a program to its end and return what it wrote.

    Raises UserError with its last lines when it fails or takes too long.
    """
    parent = os.getpid()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=child_environment(**(environment or {})),
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(parent),
    )
    try:
        ending = asyncio.wait_for(process.communicate(), _LIMIT)
        output, _ = await unless_stopped(ending, place.stop)
    except TimeoutError:
        raise UserError(f"{command[0]} took longer than {_LIMIT:g} s") from None
    finally:
        if process.returncode is None:
            kill_group(process.pid)
        await kill_process(process)
    text = output.decode("utf-8", "replace")
    if process.returncode:
        last = " | ".join(text.strip().splitlines()[-3:]) or "it wrote nothing"
        raise UserError(f"{Path(command[0]).name} ended with status {process.returncode}: {last}")
    return text


# --- lm-evaluation-harness -----------------------------------------------------------------------


class Harness(msgspec.Struct, frozen=True, kw_only=True):
    """How lm-evaluation-harness is run. command: empty: the installed one. completions, chat:
    tasks for its two clients. limit: items of a task. include: a folder with more tasks."""

    command: str = ""
    completions: tuple[str, ...] = ("gsm8k",)
    chat: tuple[str, ...] = ("ifeval",)
    limit: int = 200
    include: str | None = None


def harness_steps(harness: Harness, profile: Profile, serving: Serving) -> list[Step]:
    """A step for each client of the harness, which runs as it is."""
    clients = {"local-completions": harness.completions, "local-chat-completions": harness.chat}
    return [
        _harness_step(client, tasks, harness, profile, serving)
        for client, tasks in clients.items()
        if tasks
    ]


def _harness_step(
    client: str, tasks: Sequence[str], harness: Harness, profile: Profile, serving: Serving
) -> Step:
    async def work(place: Place) -> Any:
        program = _program(harness)
        folder = place.folder(f"harness/{client}")
        words = harness_words(client, tasks, harness, place.url, place.model)
        text = await run_child([*program, *words, "--output_path", str(folder)], place)
        files = sorted(folder.rglob("results_*.json"), key=lambda one: one.stat().st_mtime)
        if not files:
            last = text.strip().splitlines()[-_MOST_LINES:]
            raise UserError(f"lm-evaluation-harness wrote no results: {' | '.join(last)}")
        found = msgspec.json.decode(files[-1].read_bytes(), type=dict[str, Any])
        kept = ("results", "versions", "n-samples", "configs", "lm_eval_version")
        return {name: found[name] for name in kept if name in found}

    nameless = ModelFacts(
        name="NAME", directory=Path("MODEL"), longest=None, drafts=False, text_only=True
    )
    shown = harness_words(client, tasks, harness, "URL", nameless)
    here = bool(harness.command) or importlib.util.find_spec("lm_eval") is not None
    return Step(
        name=f"accuracy/{client}",
        section="accuracy",
        seconds=len(tasks) * harness.limit * 400 / profile.rate if here else 0.0,
        work=work,
        command=("lm_eval", *shown),
        serving=serving if here else None,
    )


def harness_words(
    client: str, tasks: Sequence[str], harness: Harness, url: str, facts: ModelFacts
) -> list[str]:
    """The arguments of the harness for one of its clients."""
    chat = client == "local-chat-completions"
    path = "chat/completions" if chat else "completions"
    model = {
        "model": facts.name,
        "base_url": f"{url}/v1/{path}",
        "num_concurrent": str(_CONCURRENCY),
        "max_retries": "3",
        "tokenized_requests": "False",
        **({} if chat else {"tokenizer": str(facts.directory)}),
    }
    words = ["--model", client, "--model_args", ",".join(f"{k}={v}" for k, v in model.items())]
    words += ["--tasks", ",".join(tasks), "--limit", str(harness.limit), "--log_samples"]
    if chat:
        words.append("--apply_chat_template")
    return [*words, "--include_path", harness.include] if harness.include else words


def _program(harness: Harness) -> list[str]:
    if harness.command:
        return shlex.split(harness.command)
    if importlib.util.find_spec("lm_eval") is None:
        raise AbsentError(
            "lm-evaluation-harness is not installed; pip install 'lm_eval[api]' transformers, or "
            "name its program with --lm-eval-command"
        )
    return [sys.executable, "-m", "lm_eval"]
