"""ModelOpt checkpoints: NVFP4 and e4m3, for all layers or from a table of layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from millrace.errors import CheckpointError
from millrace.model.formats import plain
from millrace.model.w4.entries import OTHERS, listed
from millrace.model.w4.format import W4Format
from millrace.model.w4.layers import Choice, RuledQuantization, is_part
from millrace.model.w4.layouts import E2M1Layout
from millrace.model.w4.scaled_e4m3 import ScaledE4m3
from millrace.model.weight_format import Quantization, WeightFormat

UNUSED = ("input_scale", "k_scale", "v_scale", "q_scale", "output_scale")
KNOWN: dict[str, WeightFormat] = {
    "NVFP4": W4Format(
        "NVFP4",
        E2M1Layout(
            mark=".weight_scale_2", weight=".weight", factor_name=".weight_scale_2", is_scalar=True
        ),
        16,
    ),
    "FP8": ScaledE4m3("e4m3", is_scalar=True),
}
MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class ModelOpt(W4Format):
    name: str = "ModelOpt NVFP4"
    layout: E2M1Layout = E2M1Layout()  # noqa: RUF009, frozen
    methods = ("modelopt", "modelopt_fp4", "modelopt_mixed")

    def read_config(self, entries: Mapping[str, Any]) -> Quantization:
        entries = entries.get("quantization") or entries
        algorithm = str(entries.get("quant_algo") or "").upper()
        table = entries.get("quantized_layers") or {}
        skipped = [str(n) for n in listed(entries, "exclude_modules") or listed(entries, "ignore")]
        of_layer = {name: _form(str(row.get("quant_algo")).upper()) for name, row in table.items()}
        every = None if algorithm == MIXED else _form(algorithm)

        def choose(names: list[str]) -> Choice:
            if any(fnmatch.fnmatchcase(name, one) for one in skipped for name in names):
                return None
            if algorithm != MIXED:
                return None if is_part(skipped, names) or names[0] == "lm_head" else every
            return next((of_layer[name] for name in names if name in of_layer), None)

        main = every or next(iter(of_layer.values()), plain.FORMAT)
        return RuledQuantization("modelopt", main, plain.FORMAT, choose=choose, unused=UNUSED)


def _form(algorithm: str) -> WeightFormat:
    if algorithm not in KNOWN:
        raise CheckpointError(
            f"ModelOpt with quant_algo {algorithm[:60]!r} cannot be run; {', '.join(KNOWN)} and "
            f"{MIXED} of them can; {OTHERS}"
        )
    return KNOWN[algorithm]


FORMAT = ModelOpt()
