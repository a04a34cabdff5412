"""AutoRound checkpoints of 4 bits (`quant_method` "auto-round"), in the layouts of GPTQ or AWQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from millrace.errors import CheckpointError
from millrace.model.formats import plain
from millrace.model.w4.entries import OTHERS, checked_bits, checked_group, flag, listed
from millrace.model.w4.format import W4Format
from millrace.model.w4.layers import Choice, RuledQuantization, compiled, is_part
from millrace.model.w4.layouts import AwqLayout, GptqLayout
from millrace.model.weight_format import Quantization

# Packings, and their layouts without zeros; "gptqmodel" has zeros as they are, not less one.
LAYOUTS: dict[str, GptqLayout | AwqLayout] = {
    "auto_round:auto_gptq": GptqLayout(),
    "auto_round:auto_awq": AwqLayout(has_zeros=False),
    "auto_round:gptqmodel": GptqLayout(zero_less_one=False),
}
PLAIN_NAMES = {"auto_gptq": "auto_round:auto_gptq", "auto_awq": "auto_round:auto_awq"}
SPECIAL = set(r"*+?^$()[]{}|\\")  # characters of names that are regular expressions


@dataclass(frozen=True)
class AutoRound(W4Format):
    name: str = "AutoRound int4"
    layout: GptqLayout | AwqLayout = GptqLayout()  # noqa: RUF009, frozen
    methods = ("auto-round", "auto_round", "intel/auto-round")

    def read_config(self, entries: Mapping[str, Any]) -> Quantization:
        checked_bits(entries, "bits", "auto-round")
        given = entries.get("packing_format") or entries.get("backend") or "auto_gptq"
        packing = PLAIN_NAMES.get(str(given), str(given))
        if packing not in LAYOUTS:
            raise CheckpointError(
                f"quantization 'auto-round' with packing_format {packing[:60]!r} cannot be "
                f"run; {', '.join(LAYOUTS)} can; {OTHERS}"
            )
        base = LAYOUTS[packing]
        group, sym = checked_group(entries, "group_size"), flag(entries, "sym", True)
        form = replace(self, layout=replace(base, has_zeros=not sym), group=group)
        own = entries.get("extra_config") or {}
        blocks = [str(name) for name in _flat(listed(entries, "block_name_to_quantize"))]
        skipped = listed(entries, "modules_to_not_convert")

        def choose(names: list[str]) -> Choice:
            changes = _changes(own, names)
            if changes is not None:
                return _changed(form, changes, sym)
            if names[0] == "lm_head" or is_part(skipped, names):
                return None
            inside = not blocks or any(f"{n}.".startswith(f"{b}.") for n in names for b in blocks)
            return form if inside else None

        return RuledQuantization("auto-round", form, plain.FORMAT, choose=choose)


def _flat(found: list[Any]) -> list[Any]:
    return [name for part in found for name in (part if isinstance(part, list) else [part])]


def _changes(own: Mapping[str, Any], names: list[str]) -> Mapping[str, Any] | None:
    """What `extra_config` says of a layer: under its name, else under a pattern."""
    for name in names:
        if name in own:
            found: Mapping[str, Any] = own[name]
            return found
    for pattern, entries in own.items():
        if SPECIAL & set(pattern) and any(compiled(pattern).search(name) for name in names):
            changes: Mapping[str, Any] = entries
            return changes
    return None


def _changed(form: AutoRound, changes: Mapping[str, Any], sym: bool) -> Choice:
    bits = changes.get("bits", 4)
    if bits >= 16:
        return None
    if bits != 4 or changes.get("data_type", "int") != "int":
        kind = changes.get("data_type", "int")
        return f"AutoRound with {bits} bits of {kind} cannot be run; 4 bits of int can, and 16"
    layout = replace(form.layout, has_zeros=not changes.get("sym", sym))
    return replace(form, layout=layout, group=checked_group(changes, "group_size", form.group))


FORMAT = AutoRound()
