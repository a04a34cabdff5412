"""GPTQ checkpoints of 4 bits (`quant_method` "gptq")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from millrace.model.formats import plain
from millrace.model.w4.entries import checked_bits, checked_group, flag, listed, named
from millrace.model.w4.format import W4Format
from millrace.model.w4.layers import Choice, RuledQuantization, is_part, matches
from millrace.model.w4.layouts import GptqLayout
from millrace.model.weight_format import Quantization

VERSIONS = {"gptq": True, "gptq_v2": False}  # whether zeros are stored less one


@dataclass(frozen=True)
class Gptq(W4Format):
    """desc_act: groups have any columns, which are sorted when they are loaded."""

    name: str = "GPTQ int4"
    layout: GptqLayout = GptqLayout()  # noqa: RUF009, frozen
    methods = ("gptq", "gptq_marlin")

    def read_config(self, entries: Mapping[str, Any]) -> Quantization:
        bits = checked_bits(entries, "bits", "gptq")
        version = named(entries, "checkpoint_format", "gptq", *VERSIONS)
        layout = GptqLayout(
            has_zeros=not flag(entries, "sym", True),
            in_order=not flag(entries, "desc_act", False),
            zero_less_one=VERSIONS[version],
        )
        form = replace(self, layout=layout, group=checked_group(entries, "group_size"))
        dynamic = entries.get("dynamic") or {}
        inside = [name for names in listed(entries, "modules_in_block_to_quantize")
                  for name in ([names] if isinstance(names, str) else names)]  # fmt: skip
        skipped = listed(entries, "modules_to_not_convert")
        head = flag(entries, "lm_head", False)

        def choose(names: list[str]) -> Choice:
            if (names[0] == "lm_head" and not head) or is_part(skipped, names):
                return None
            if inside and not is_part(inside, names):
                return None
            for pattern, changes in dynamic.items():
                if matches(pattern.removeprefix("+:").removeprefix("-:"), names):
                    return None if pattern.startswith("-:") else _changed(form, changes, bits)
            return form

        return RuledQuantization("gptq", form, plain.FORMAT, choose=choose)


def _changed(form: Gptq, changes: Mapping[str, Any], bits: int) -> Choice:
    """The format of a layer with entries of its own."""
    if (found := changes.get("bits", bits)) != 4:
        return f"GPTQ with {found} bits cannot be run; 4 bits can"
    layout = replace(
        form.layout,
        has_zeros=not changes.get("sym", not form.layout.has_zeros),
        in_order=not changes.get("desc_act", not form.layout.in_order),
    )
    return replace(form, layout=layout, group=checked_group(changes, "group_size", form.group))


FORMAT = Gptq()
