"""AWQ checkpoints of 4 bits (`quant_method` "awq", version "gemm")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from millrace.model.formats import plain
from millrace.model.w4.entries import checked_bits, checked_group, flag, listed, named
from millrace.model.w4.format import W4Format
from millrace.model.w4.layers import Choice, RuledQuantization, is_part
from millrace.model.w4.layouts import AwqLayout
from millrace.model.weight_format import Quantization


@dataclass(frozen=True)
class Awq(W4Format):
    name: str = "AWQ int4"
    layout: AwqLayout = AwqLayout()  # noqa: RUF009, frozen
    methods = ("awq", "awq_marlin")

    def read_config(self, entries: Mapping[str, Any]) -> Quantization:
        checked_bits(entries, "w_bit", "awq")
        named(entries, "version", "gemm", "gemm")
        size = "q_group_size" if "q_group_size" in entries else "group_size"
        form = replace(
            self,
            layout=AwqLayout(has_zeros=flag(entries, "zero_point", True)),
            group=checked_group(entries, size),
        )
        skipped = listed(entries, "modules_to_not_convert")

        def choose(names: list[str]) -> Choice:
            return None if names[0] == "lm_head" or is_part(skipped, names) else form

        return RuledQuantization("awq", form, plain.FORMAT, choose=choose)


FORMAT = Awq()
