"""compressed-tensors checkpoints: int4, NVFP4, MXFP4 and e4m3, group by group of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from millrace.errors import CheckpointError
from millrace.model.formats import plain
from millrace.model.w4.entries import OTHERS, checked_group, flag, listed
from millrace.model.w4.format import W4Format
from millrace.model.w4.layers import Choice, RuledQuantization, matches
from millrace.model.w4.layouts import E2M1Layout, PackedLayout
from millrace.model.w4.scaled_e4m3 import ScaledE4m3
from millrace.model.weight_format import Quantization, WeightFormat

UNUSED = ("input_scale", "input_global_scale", "k_scale", "v_scale", "q_scale", "output_scale")
NVFP4 = W4Format("NVFP4", E2M1Layout(factor_name=".weight_global_scale", divides=True), 16)
MXFP4 = W4Format("MXFP4", E2M1Layout(power_scales=True), 32)


@dataclass(frozen=True)
class CompressedTensors(W4Format):
    name: str = "compressed-tensors int4"
    layout: PackedLayout = PackedLayout()  # noqa: RUF009, frozen
    methods = ("compressed-tensors",)

    def read_config(self, entries: Mapping[str, Any]) -> Quantization:
        groups = entries.get("config_groups") or {}
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError("compressed-tensors without config_groups cannot be read")
        found = [
            (listed(group, "targets"), self._form(name, group, entries))
            for name, group in groups.items()
        ]
        ignored = [str(name) for name in listed(entries, "ignore")]

        def choose(names: list[str]) -> Choice:
            if any(_is_target(pattern, names) for pattern in ignored):
                return None
            exact = [form for targets, form in found if any(_is_target(t, names) for t in targets)]
            every = [form for targets, form in found if "Linear" in targets]
            return [*exact, *every, None][0] if names[0] != "lm_head" or exact else None

        return RuledQuantization(
            "compressed-tensors", found[0][1], plain.FORMAT, choose=choose, unused=UNUSED
        )

    def _form(self, name: str, group: Any, entries: Mapping[str, Any]) -> WeightFormat:
        """The format of one group of layers."""
        weights = (group.get("weights") if isinstance(group, Mapping) else None) or {}
        kind, bits = weights.get("type", "int"), weights.get("num_bits")
        strategy, stored = weights.get("strategy"), group.get("format") or entries.get("format")
        if (kind, bits) == ("int", 4) and stored == "pack-quantized" and strategy in SHAPES_OF_INT4:
            layout = PackedLayout(
                has_zeros=not flag(weights, "symmetric", True),
                in_order=weights.get("actorder") not in ("group", "dynamic"),
            )
            size = -1 if strategy == "channel" else checked_group(weights, "group_size")
            return replace(self, layout=layout, group=size)
        if (kind, bits, stored) == ("float", 4, "nvfp4-pack-quantized"):
            return NVFP4
        if (kind, bits, stored) == ("float", 4, "mxfp4-pack-quantized"):
            return MXFP4
        if (kind, bits) == ("float", 8) and strategy in ("tensor", "channel"):
            return ScaledE4m3("e4m3", by_row=strategy == "channel")
        raise CheckpointError(
            f"compressed-tensors group {name!r} ({bits} bits of {kind}, strategy {strategy}, "
            f"format {stored}) cannot be run; pack-quantized int4, NVFP4, MXFP4 and e4m3 by tensor "
            f"or channel can; {OTHERS}"
        )


SHAPES_OF_INT4 = ("group", "channel", None)


def _is_target(pattern: str, names: list[str]) -> bool:
    """Whether a pattern of `targets` or `ignore` names the layer, rather than a class of layers."""
    if pattern.startswith("re:"):
        return matches(pattern.removeprefix("re:"), names)
    return pattern in names


FORMAT = CompressedTensors()
