"""Log-probabilities of sampled tokens, compared with those that transformers computes.

The server answers several texts at once, at temperature 1, so that prompts, decoding rows and
drafts share steps. Then it is ended, and transformers reads each answer as one sequence (teacher
forcing) in float32 and in bfloat16, in a process of its own. The truth is float32; what bfloat16
differs from it is the noise of the number format, beside which the engine's difference stands.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import statistics
from typing import Any

import msgspec

from millrace.bench.load.interrupts import unless_stopped
from millrace.common.child_process import python_module
from millrace.common.http_client import error_text, fetch
from millrace.errors import UserError
from millrace.report.sections.accuracy import run_child
from millrace.report.steps.journal import write_whole
from millrace.report.steps.profiles import Profile
from millrace.report.steps.step import AbsentError, Place, Serving, Step
from millrace.report.steps.texts import mixed

_LIMIT = 600.0  # seconds of one answer
_SAMPLED = "logprobs/sampled.json"
_REFERENCE = "logprobs/reference.json"


class Sampled(msgspec.Struct, frozen=True):
    """One answer: tokens of the prompt and of the answer, and the engine's log-probabilities."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def logprob_steps(profile: Profile, serving: Serving) -> list[Step]:
    """The answers of the server, then those of transformers."""
    here = importlib.util.find_spec("transformers") is not None

    async def sample(place: Place) -> Any:
        texts = mixed(profile.logprob_texts, seed=17)
        answers = await unless_stopped(_answers(place, texts), place.stop)
        data = msgspec.json.encode(answers)
        place.folder("logprobs")
        write_whole(place.directory / _SAMPLED, data)
        return [msgspec.to_builtins(one) for one in answers]

    async def refer(place: Place) -> Any:
        if not here:
            raise AbsentError("transformers is not installed; pip install transformers")
        file = place.directory / _REFERENCE
        file.unlink(missing_ok=True)
        words = [str(place.model.directory), str(place.directory / _SAMPLED), str(file)]
        await run_child(python_module("millrace.report.reference", *words), place)
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        if "absent" in found:
            raise AbsentError(str(found["absent"]))
        return found

    tokens = profile.logprob_texts * profile.logprob_tokens
    return [
        Step(
            name="logprobs/engine",
            section="logprobs",
            seconds=tokens / profile.rate + 2.0,
            work=sample,
            command=("POST", "/v1/completions", "logprobs=0", "temperature=1"),
            serving=serving,
        ),
        Step(
            name="logprobs/transformers",
            section="logprobs",
            seconds=40.0 if here else 0.0,
            work=refer,
            command=("python", "-m", "millrace.report.reference", "MODEL", _SAMPLED, _REFERENCE),
            needs=("logprobs/engine",),
        ),
    ]


async def _answers(place: Place, texts: list[list[dict[str, Any]]]) -> list[Sampled]:
    """The answers to all texts, at once."""
    return list(await asyncio.gather(*(_answer(place, t, seed) for seed, t in enumerate(texts))))


async def _answer(place: Place, messages: list[dict[str, Any]], seed: int) -> Sampled:
    prompt = (await _post(place, "/tokenize", {"messages": messages}))["tokens"]
    body = {
        "prompt": prompt,
        "max_tokens": place.profile.logprob_tokens,
        "temperature": 1.0,
        "seed": seed,
        "logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    (choice,) = (await _post(place, "/v1/completions", body))["choices"]
    found = Sampled(prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"])
    if len(found.tokens) != len(found.logprobs):
        raise UserError("the server gave another number of log-probabilities than of tokens")
    return found


async def _post(place: Place, path: str, body: dict[str, Any]) -> Any:
    assert place.target is not None
    data = msgspec.json.encode(body)
    answer = await fetch(place.target, path, method="POST", body=data, timeout=_LIMIT)
    if answer.status != 200:
        raise UserError(f"{path} answered {answer.status}: {error_text(answer.body)}")
    return msgspec.json.decode(answer.body)


def compared(engine: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    """The differences of the engine from float32, beside those of bfloat16 from it."""
    ours = [value for one in engine for value in one["logprobs"]]
    known = {name: [v for row in rows for v in row] for name, rows in reference["logprobs"].items()}
    truth_name = "float32" if "float32" in known else "bfloat16"
    truth = known[truth_name]
    found: dict[str, Any] = {"tokens": len(ours), "truth": truth_name}
    found["engine"] = differences(ours, truth)
    if truth_name == "float32" and "bfloat16" in known:
        found["noise_of_bfloat16"] = differences(known["bfloat16"], truth)
    return found


def differences(got: list[float], truth: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest of the absolute differences."""
    gaps = sorted(abs(a - b) for a, b in zip(got, truth, strict=True))
    at = max(0, math.ceil(0.99 * len(gaps)) - 1)
    return {"median": statistics.median(gaps), "p99": gaps[at], "most": gaps[-1]}
