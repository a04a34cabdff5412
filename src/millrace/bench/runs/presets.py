"""Known sets of flags, and how they fill in what a command line leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import msgspec
from click.core import ParameterSource

from millrace.errors import UserError


class Preset(msgspec.Struct, frozen=True):
    """What a preset sets where the command line does not. Per-GPU and per-place counts are
    multiplied by --gpus and by the concurrency."""

    flags: dict[str, Any]
    concurrency_per_gpu: int | None
    prompts_per_place: int
    warmups_per_place: int


PRESETS: Mapping[str, Preset] = {
    # 256 in flight a GPU is what Little's law gives for its figures: 83 requests/s on 8 GPUs,
    # each for 25 s.
    "write-up": Preset(
        {
            "random_input_len": 1024,
            "random_output_len": 512,
            "random_range_ratio": 0.5,
            "random_range_convention": "inferencex",
            "ignore_eos": True,
            "temperature": 1.0,
        },
        concurrency_per_gpu=256,
        prompts_per_place=5,
        warmups_per_place=1,
    ),
    "inferencex": Preset(
        {
            "random_input_len": 1024,
            "random_output_len": 1024,
            "random_range_ratio": 0.8,
            "random_range_convention": "inferencex",
            "ignore_eos": True,
            "temperature": 0.0,
        },
        concurrency_per_gpu=None,
        prompts_per_place=10,
        warmups_per_place=2,
    ),
}


def with_preset(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags with those of the preset where the command line is silent."""
    filled = dict(flags)
    if filled.get("preset") is None:
        return filled
    preset = PRESETS[filled["preset"]]
    chosen = {name for name in filled if _on_command_line(name)} | set(filled.get("over") or ())
    filled |= {name: value for name, value in preset.flags.items() if name not in chosen}
    if preset.concurrency_per_gpu is not None and "max_concurrency" not in chosen:
        filled["max_concurrency"] = preset.concurrency_per_gpu * (filled["gpus"] or 1)
    places = filled["max_concurrency"]
    if places is None:
        raise UserError(
            f"--preset {filled['preset']} counts by concurrency: give --max-concurrency"
        )
    if "num_prompts" not in chosen and filled["duration"] is None:
        filled["num_prompts"] = preset.prompts_per_place * places
    if "num_warmups" not in chosen:
        filled["num_warmups"] = preset.warmups_per_place * places
    return filled


def _on_command_line(name: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
