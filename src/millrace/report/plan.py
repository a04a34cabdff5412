"""What a report consists of: from what was asked for to its steps, in the order in which they run.

Steps that need equal servers stand together, so that few starts are needed.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from millrace.common.child_process import python_module
from millrace.errors import CheckpointError, ConfigError
from millrace.report.sections.accuracy import Harness, harness_steps, task_steps
from millrace.report.sections.environment import client_step, environment_step, startup_steps
from millrace.report.sections.load import (
    acceptance_steps,
    batch_steps,
    long_steps,
    prefix_step,
    throughput_steps,
)
from millrace.report.sections.logprobs import logprob_steps
from millrace.report.sections.versus import OURS, versus_drafts, versus_steps
from millrace.report.steps.profiles import Profile
from millrace.report.steps.step import ModelFacts, Serving, Step

SECTIONS = {
    "environment": "versions, devices, kernels and packages of the machine",
    "client": "the error of the load generator",
    "accuracy": "our tasks, and lm-evaluation-harness where it is installed",
    "batches": "texts at 1, 8 and 32 streams",
    "prefix": "prompts that begin alike",
    "logprobs": "log-probabilities against transformers",
    "acceptance": "drafts accepted, by position and kind of text",
    "throughput": "headline and write-up: many streams of random tokens",
    "long": "long prompts",
    "startup": "cold and warm starts",
    "versus": "other servers under the same load, by turns",
}
SERVE = tuple(python_module("millrace.cli", "serve"))
_HEADROOM = 64  # tokens that a template and special tokens may take


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a report is made of. serve_arguments: of every start of `millrace serve`. peers: servers
    to compare with. serve_program: the command that serves a model."""

    model: ModelFacts
    profile: Profile
    sections: Sequence[str]
    serve_arguments: Sequence[str] = ()
    peers: Sequence[Serving] = ()
    rounds: int = 3
    harness: Harness = Harness()
    serve_program: Sequence[str] = SERVE


def read_sections(text: str | None, versus: bool) -> list[str]:
    """The sections that a comma-separated list names; None: all, `versus` where peers are named.

    Raises ConfigError for an unknown one.
    """
    if text is None:
        return [name for name in SECTIONS if versus or name != "versus"]
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for name in chosen:
        if name not in SECTIONS:
            raise ConfigError(f"--sections {name}: use {', '.join(SECTIONS)}")
    if "versus" in chosen and not versus:
        raise ConfigError("--sections versus: name the servers with --versus vllm,sglang")
    if not chosen:
        raise ConfigError(f"--sections names none; use {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in chosen]


def model_facts(name: str, directory: Path) -> ModelFacts:
    """What the steps need to know of a model. Raises CheckpointError for a bad config.json."""
    try:
        config = msgspec.json.decode((directory / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{directory}/config.json cannot be read ({error})") from None
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, dict) else config
    longest = inner.get("max_position_embeddings")
    layers = inner.get("mtp_num_hidden_layers") or inner.get("num_nextn_predict_layers") or 0
    return ModelFacts(
        name=Path(name).name,
        directory=directory,
        longest=longest if isinstance(longest, int) else None,
        drafts=bool(layers),
        text_only="vision_config" not in config,
    )


def steps_of(request: Request) -> list[Step]:
    """All steps of the sections that were asked for."""
    profile, model = request.profile, request.model
    served = own_serving(request, "served", drafts=1)
    parts = {
        "environment": lambda: [environment_step()],
        "client": lambda: [client_step(profile)],
        "accuracy": lambda: [
            *task_steps(profile, served), *harness_steps(request.harness, profile, served),
        ],
        "batches": lambda: batch_steps(profile, served),
        "prefix": lambda: [prefix_step(profile, served)],
        "logprobs": lambda: logprob_steps(profile, served),
        "acceptance": lambda: acceptance_steps(
            profile, own_serving(request, "acceptance", drafts=profile.drafts), model.drafts
        ),
        "throughput": lambda: throughput_steps(profile, headline_serving(request)),
        "long": lambda: long_steps(profile, long_serving(request)),
        "startup": lambda: startup_steps(
            profile, served, shown_server(served, model, request.serve_program)
        ),
        "versus": lambda: versus_steps(
            [own_serving(request, OURS, drafts=versus_drafts()), *request.peers],
            profile,
            request.rounds,
        ),
    }  # fmt: skip
    return [step for name in request.sections for step in parts[name]()]


# --- our own servers -----------------------------------------------------------------------------


def own_serving(
    request: Request,
    name: str,
    *,
    drafts: int,
    more: Sequence[str] = (),
    length: int | None = None,
) -> Serving:
    """A start of `millrace serve`; what the user gave comes last, so it wins. drafts: 0: none."""
    profile, model = request.profile, request.model
    words = [
        *(*request.serve_program, str(model.directory), "--served-model-name", model.name),
        *("--max-model-len", str(length or profile.max_model_len)),
        *("--max-num-seqs", str(profile.streams)),
    ]
    if model.drafts and drafts:
        config = {"method": "mtp", "num_speculative_tokens": drafts}
        words += ["--speculative-config", msgspec.json.encode(config).decode()]
    return Serving(name=name, command=(*words, *more, *request.serve_arguments))


def headline_serving(request: Request) -> Serving:
    """The write-up's server: one draft, no prefix cache, on a GPU FP8 keys and values."""
    more = ["--no-enable-prefix-caching", *request.profile.headline_arguments]
    return own_serving(request, "headline", drafts=1, more=more)


def long_serving(request: Request) -> Serving:
    """For long prompts: three drafts, as the published figures beside ours have."""
    profile = request.profile
    need = sum(profile.long_lengths) + _HEADROOM
    length = max(need, profile.max_model_len) if request.model.longest is None else None
    return own_serving(request, "long", drafts=profile.long_drafts, length=length)


def shown_server(serving: Serving | None, model: ModelFacts, program: Sequence[str]) -> list[str]:
    """A server's command without paths of this machine."""
    if serving is None:
        return []
    words = list(serving.command)
    if words[: len(program)] == list(program):
        words = ["millrace", "serve", *words[len(program) :]]
    words = ["MODEL" if word == str(model.directory) else word for word in words]
    words[0] = Path(words[0]).name
    return [*(f"{name}={value}" for name, value in serving.environment), *words]


def split_arguments(text: str) -> list[str]:
    """Words of a command line. Raises ConfigError for a quote that does not end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}") from None
