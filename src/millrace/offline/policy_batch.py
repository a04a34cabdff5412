"""The batch of `millrace batch --task policy`: generated policies whose fields are known.

Its requests ask for all fields of a policy, bound to their JSON schema. Answers are graded against
the facts that the policies were written from; an item is made anew from its number, so nothing
grows with the number of policies. How requests are answered is not known here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import msgspec

from millrace.batch.journal import Counts
from millrace.errors import UserError
from millrace.plan.model.step_model import Description
from millrace.plan.predict.capacity import batch
from millrace.plan.predict.load import Load, settings_of
from millrace.plan.predict.prediction import Deployment, Planner
from millrace.tasks import Item, find_task

_KIND = "extract"  # the question for all fields
_SEED = 0
_START = "policy-"  # of a custom_id, before the item's number


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_SUM = {"type": "integer"}
SCHEMA = _object(
    {
        "policyholder": _TEXT,
        "policy_number": _TEXT,
        "period": _object({"from": _TEXT, "to": _TEXT}),
        "covered_perils": _TEXTS,
        "exclusions": _TEXTS,
        "currency": _TEXT,
        "deductible": _SUM,
        "limits": {"type": "object", "additionalProperties": _SUM},
        "washing_machine": _object(
            {
                "covered": {"enum": ["yes", "no", "not stated"]},
                "clause": {"type": ["string", "null"]},
            }
        ),
    }
)


def items() -> Iterator[Item]:
    """Held-out policies with the question for all fields, without end."""
    task = find_task("policy")
    made = (task.make(index, _SEED, "heldout") for index in count())
    return (item for item in made if item.kind == _KIND)


def write_requests(path: Path, number: int, model: str) -> None:
    """The requests of `number` policies; the same file each time. Raises UserError."""
    form = {"type": "json_schema", "json_schema": {"name": "policy", "schema": SCHEMA}}
    shared = {
        "model": model, "temperature": 0, "max_tokens": find_task("policy").max_tokens,
        "response_format": form, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            for item in islice(items(), number):
                line = {
                    "custom_id": f"{_START}{item.index}", "method": "POST",
                    "url": "/v1/chat/completions", "body": {"messages": item.messages, **shared},
                }  # fmt: skip
                file.write(msgspec.json.encode(line) + b"\n")
        os.replace(new, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


# --- grading -------------------------------------------------------------------------------------


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Body(msgspec.Struct):
    choices: list[_Choice]


class _Response(msgspec.Struct):
    body: _Body


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response


def accuracy(output: Path, number: int) -> str:
    """`policies: 9,900 of 10,000 right (99.00%); fields: ...`. What failed counts as wrong."""
    task, decode = find_task("policy"), msgspec.json.Decoder(_Line).decode
    right, wrong = 0, Counter[str]()
    fields = answered = 0
    with output.open("rb") as file:
        for data in file:
            line = decode(data)
            item = task.make(int(line.custom_id.removeprefix(_START)), _SEED, "heldout")
            found = task.grade(item, line.response.body.choices[0].message.content or "")
            answered += 1
            right += found.correct
            fields += len(found.fields)
            wrong.update(name for name, good in found.fields.items() if not good)
    good = fields - wrong.total()
    worst = ", ".join(f"{name} {times:,}" for name, times in wrong.most_common(3))
    return (
        f"policies: {right:,} of {number:,} right ({right / number:.2%}), {answered:,} answered; "
        f"fields: {good:,} of {fields:,} right" + (f"; wrong most often: {worst}" if worst else "")
    )


# --- the planner's estimate ----------------------------------------------------------------------


def estimate(counts: Counts, gpu: str, model: str, replicas: int, in_flight: int) -> str:
    """What the planner expects of a batch with these lengths, beside what it took.

    model: as the planner knows it. in_flight: requests at a replica. Raises ConfigError.
    """
    answered = counts.done - counts.failed
    if not answered:
        return "planner: no estimate, because nothing was answered"
    usage = counts.usage
    load = Load(
        input=usage.prompt / answered, output=usage.output / answered,
        cached=usage.cached / answered, text="policies",
        concurrency=float(min(in_flight, -(-answered // replicas)) * replicas),
    )  # fmt: skip
    load.check()
    description = Description(gpu=gpu, model=model, engine="millrace", weights="bf16", kv="bf16")
    fleet = Deployment(description, settings_of("millrace"), replicas=replicas)
    hours = batch(Planner(), fleet, load, float(answered), 0.0).hours
    value, low, high = (hour * 3600 for hour in (hours.value, hours.low, hours.high))
    return (
        f"planner: {value:,.0f} s ({low:,.0f} to {high:,.0f}), a start included, "
        f"for {load.input:.0f} prompt tokens ({load.cached:.0f} cached) and "
        f"{load.output:.0f} output tokens a policy on "
        f"{replicas} x {gpu}; it took {counts.seconds:,.0f} s"
    )
