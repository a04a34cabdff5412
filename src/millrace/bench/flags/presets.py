"""Known sets of flags, and how a preset fills in what the command line leaves open."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from millrace.bench.flags.structs import LoadFlags, PresetName
from millrace.errors import UserError


class Preset(msgspec.Struct, frozen=True):
    """The flags that a preset sets. Its counts are multiplied by --gpus and by the concurrency."""

    flags: dict[str, Any]
    concurrency_per_gpu: int | None
    prompts_per_slot: int
    warmups_per_slot: int


PRESETS: Mapping[PresetName, Preset] = {
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
        prompts_per_slot=5,
        warmups_per_slot=1,
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
        prompts_per_slot=10,
        warmups_per_slot=2,
    ),
}


def preset_values(flags: LoadFlags, chosen: Collection[str]) -> dict[str, Any]:
    """What the preset of `flags` sets. chosen: names of flags that win over the preset.

    Raises UserError when the preset needs --max-concurrency and there is none.
    """
    assert flags.preset is not None
    preset = PRESETS[flags.preset]
    values: dict[str, Any] = {**preset.flags}
    if preset.concurrency_per_gpu is not None:
        values["max_concurrency"] = preset.concurrency_per_gpu * (flags.gpus or 1)
    concurrency = flags.max_concurrency
    if "max_concurrency" not in chosen:
        concurrency = values.get("max_concurrency", concurrency)
    if concurrency is None:
        raise UserError(f"--preset {flags.preset} counts by concurrency: give --max-concurrency")
    if flags.duration is None:
        values["num_prompts"] = preset.prompts_per_slot * concurrency
    values["num_warmups"] = preset.warmups_per_slot * concurrency
    return {name: value for name, value in values.items() if name not in chosen}
