"""Command-line options that the planner's commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from millrace.common.flags import Count
from millrace.errors import ConfigError
from millrace.hardware.gpus import gpu, gpus
from millrace.model.work.layout import CACHE_BYTES, WEIGHT_BYTES
from millrace.plan.facts.prices import KINDS
from millrace.plan.model.posterior import Posterior, posterior, read_calibration
from millrace.plan.predict.load import Load

_Value = TypeVar("_Value")
_Command = TypeVar("_Command", bound=Callable[..., Any])

FILE = click.Path(dir_okay=False, path_type=Path)


def together(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


load_options = together(
    click.option("--input", type=float, default=1024, show_default=True,
                 help="Mean tokens of a prompt."),
    click.option("--output", type=float, default=256, show_default=True,
                 help="Mean tokens of an answer."),
    click.option("--cached", type=float, default=0,
                 help="Of a prompt's tokens, those that the prefix cache has."),
    click.option("--concurrency", type=float, help="Streams at once (a closed loop)."),
    click.option("--rate", type=float, help="Requests a second (an open loop)."),
    click.option("--text", default="mixed", show_default=True,
                 help="Kind of text, which decides how often drafts are accepted; or a share."),
)  # fmt: skip

engine_options = together(
    click.option("--engine", type=click.Choice(["millrace", "vllm", "sglang"]),
                 default="millrace", show_default=True, help="Engine of the replicas."),
    click.option("--max-model-len", type=Count(), default=4096, show_default=True,
                 help="Longest sequence, prompt and answer."),
    click.option("--gpu-memory-utilization", "utilization", type=click.FloatRange(0.1, 1.0),
                 default=0.92, show_default=True, help="Share of a GPU's memory."),
    click.option("--calibration", type=FILE, help="A file of `millrace plan calibrate`."),
)  # fmt: skip

settings_options = together(
    click.option("--gpu", required=True, help="GPU of a replica; `millrace plan gpus` lists them."),
    click.option("--weights", type=click.Choice(list(WEIGHT_BYTES)), default="fp8",
                 show_default=True, help="Format of the weights."),
    click.option("--kv", type=click.Choice(list(CACHE_BYTES)), help="Of keys and values."),
    click.option("--state", type=click.Choice(list(CACHE_BYTES)), default="fp32",
                 show_default=True, help="Of recurrent states."),
    click.option("--tensor-parallel-size", "tensor", type=int, default=1, show_default=True,
                 help="GPUs of a replica."),
    click.option("--drafts", type=click.IntRange(0, 5), default=0, show_default=True,
                 help="Drafts that a step verifies."),
)  # fmt: skip

price_options = together(
    click.option("--price", type=float, help="Dollars a GPU-hour; without it the table's lowest."),
    click.option("--price-kind", type=click.Choice(KINDS), help="Kind of price in the table."),
    click.option("--busy", type=float, default=1.0, show_default=True,
                 help="Share of the time in which the fleet is full."),
)  # fmt: skip

output_options = together(
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option("--html", type=FILE, help="Also write an HTML file with plots."),
)


def load_of(options: dict[str, Any]) -> Load:
    """The load that `load_options` describe. Raises ConfigError if it is none."""
    load = Load(
        input=options["input"], output=options["output"], cached=options["cached"],
        concurrency=options["concurrency"] or 0.0, rate=options["rate"] or 0.0,
        text=options["text"],
    )  # fmt: skip
    load.check()
    return load


def listed(text: str, kind: Callable[[str], _Value], name: str) -> list[_Value]:
    """Values with commas between them. Raises ConfigError for others."""
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} {text}: use numbers with commas between them") from None


def kinds_of(names: tuple[str, ...]) -> list[str]:
    """GPUs by name; "all" is every GPU. Raises ConfigError for unknown ones."""
    listed = [name for given in names for name in given.split(",")]
    if "all" in listed:
        return [found.name for found in gpus().values() if not found.cpu]
    return [gpu(name).name for name in listed]


def known(calibration: Path | None) -> Posterior:
    """The fit to predict with."""
    return posterior() if calibration is None else read_calibration(calibration)
