"""Writes a quantized checkpoint from a plain one, tensor by tensor.

Which layers are quantized follows from the model: those that a checkpoint of that format has
quantized. Everything else is copied. It knows files and names; the rounding is in `rounding.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from millrace.errors import CheckpointError, ConfigError
from millrace.kernels.gemm import pack
from millrace.model.build import build_model
from millrace.model.config import ModelConfig, read_config
from millrace.model.family import Family
from millrace.model.parameter import Piece, full_tensor
from millrace.model.registry import family_named, quantization_of
from millrace.model.weights import INDEX, Checkpoint, expected_tensors, load
from millrace.quantize.calibration import hessians
from millrace.quantize.rounding import Int4, gptq_int4, round_fp8, round_int4

SHARD = 4 << 30  # bytes of a file
NOT_COPIED = {"config.json", INDEX}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """to: "fp8" or "int4". group: columns that share a scale, of int4. prompts: token ids that GPTQ
    reads; none: values are rounded to the nearest."""

    to: str
    group: int = 128
    prompts: Sequence[list[int]] = ()


@dataclass(slots=True)
class Summary:
    """Layers that were quantized, bytes before and after, and the error of the weights: the norm
    of the difference, as a part of the norm."""

    layers: int = 0
    before: int = 0
    after: int = 0
    square_error: float = 0.0
    square: float = 0.0

    @property
    def error(self) -> float:
        return float((self.square_error / max(self.square, 1e-30)) ** 0.5)


def quantize_checkpoint(source: Path, out: Path, target: Target) -> Summary:
    """Write the quantized twin of `source` into `out`, which must be empty or not there.

    Raises CheckpointError or ConfigError, in one line.
    """
    config = read_config(source)
    if config.quantization.method != "none":
        raise CheckpointError(
            f"{source} is quantized already ({config.quantization.format.name}); give the "
            f"{config.dtype} checkpoint that it was made of"
        )
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give another --out")
    family, summary = family_named(config.family), Summary()
    with Checkpoint(source, family) as files:
        wanted = _wanted(config, target, set(files.names))
        if not wanted:
            raise ConfigError(
                f"no layer of {source} can be quantized in groups of {target.group}: their inputs "
                "must be multiples of it; give a smaller --group-size"
            )
        out.mkdir(parents=True, exist_ok=True)
        quantized = _quantized(source, config, files, wanted, target, summary)
        writer = _Writer(out)
        left_out = _write(files, family, wanted, quantized, writer)
        writer.close()
    _write_config(source, out, _entries(target, left_out))
    _copy_others(source, out)
    summary.before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    summary.after = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return summary


# --- layers -------------------------------------------------------------------------------------


def _wanted(config: ModelConfig, target: Target, names: set[str]) -> set[str]:
    """Modules to quantize: those that the model would expect to be."""
    form = replace(config, quantization=quantization_of(_entries(target, [])))
    mark = ".weight_packed" if target.to == "int4" else ".weight_scale_inv"
    expected = expected_tensors(form)
    found = {name.removesuffix(mark) for name in expected if name.endswith(mark)}
    found = {module for module in found if f"{module}.weight" in names}
    if target.to == "fp8":
        return found
    inputs = {module: 8 * expected[f"{module}{mark}"].shape[1] for module in found}
    return {
        module
        for module in found
        if inputs[module] % target.group == 0 and not module.startswith("mtp.")
    }


def _quantized(
    source: Path,
    config: ModelConfig,
    files: Checkpoint,
    wanted: set[str],
    target: Target,
    summary: Summary,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(module, its tensors by the ends of their names), first those that GPTQ has inputs of."""
    done: set[str] = set()
    if target.prompts:
        model = build_model(config, dtype=torch.float32)
        load(model, source)
        for of_layers in hessians(model, wanted, target.prompts):
            for module, hessian in of_layers.items():
                weight = _weight(files, module)
                found = gptq_int4(weight, hessian, target.group)
                yield module, _int4(found, weight, summary)
                done.add(module)
        if rest := len(wanted - done):
            logger.info("%d layers of experts are rounded to the nearest", rest)
    for module in sorted(wanted - done):
        weight = _weight(files, module)
        if target.to == "int4":
            yield module, _int4(round_int4(weight, target.group), weight, summary)
        else:
            yield module, _fp8(weight, summary)


def _weight(files: Checkpoint, module: str) -> Tensor:
    name = f"{module}.weight"
    return files.read(full_tensor(name, *files.shape(name))).float()


def _int4(found: Int4, weight: Tensor, summary: Summary) -> dict[str, Tensor]:
    _note(found.dequantize(), weight, summary)
    return {
        "weight_packed": pack(found.values + 8),
        "weight_scale": found.scales,
        "weight_shape": torch.tensor(weight.shape),
    }


def _fp8(weight: Tensor, summary: Summary) -> dict[str, Tensor]:
    from millrace.kernels.gemm import dequantize

    values, scales = round_fp8(weight)
    _note(dequantize(values, scales), weight, summary)
    return {"weight": values, "weight_scale_inv": scales}


def _note(found: Tensor, weight: Tensor, summary: Summary) -> None:
    summary.layers += 1
    summary.square_error += float((found - weight).square().sum())
    summary.square += float(weight.square().sum())


# --- files --------------------------------------------------------------------------------------


class _Writer:
    """Writes tensors into files of at most SHARD bytes, in the order in which they come."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._held: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._size + tensor.nbytes > SHARD:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._size += tensor.nbytes

    def _flush(self) -> None:
        path = self._out / f"part-{len(self._files)}"
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self._files.append(list(self._held))
        self._held, self._size = {}, 0

    def close(self) -> None:
        """Name the files as others do, with an index if there are several."""
        self._flush()
        count = len(self._files)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for index, name in enumerate(names):
            (self._out / f"part-{index}").rename(self._out / name)
        if count > 1:
            places = {t: name for name, own in zip(names, self._files, strict=True) for t in own}
            _write_json(self._out / INDEX, {"metadata": {}, "weight_map": places})


def _write(
    files: Checkpoint,
    family: Family,
    wanted: set[str],
    quantized: Iterator[tuple[str, dict[str, Tensor]]],
    writer: _Writer,
) -> list[str]:
    """Write all tensors. Returns the modules with weights of two dimensions that stay plain."""
    names = {name: files.name_in_file(name) for name in files.names}
    for module, tensors in quantized:
        stem = names[f"{module}.weight"].removesuffix(".weight")
        for end, tensor in tensors.items():
            writer.add(f"{stem}.{end}", tensor)
    left_out = []
    for name, stored in names.items():
        module = name.removesuffix(".weight")
        if module in wanted:
            continue
        shape = files.shape(name)
        whole = Piece(name, shape, ((0, shape[0] if shape else 1),))
        writer.add(stored, files.read(whole))
        if len(shape) == 2 and name.endswith(".weight"):
            left_out.append(stored.removesuffix(".weight"))
    for stored in files.unused:
        writer.add(stored, files.read_unused(stored))
    unused = {name.removesuffix(".weight") for name in files.unused if name.endswith(".weight")}
    return sorted({*left_out, "lm_head", *unused})


def _entries(target: Target, left_out: list[str]) -> dict[str, Any]:
    """The `quantization_config`. left_out: modules that stay plain, by the names of the files."""
    if target.to == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": left_out,
        }
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": target.group, "actorder": None, "block_structure": None, "dynamic": False,
        "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    group = {
        "targets": ["Linear"], "weights": weights, "input_activations": None,
        "output_activations": None, "format": "pack-quantized",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": left_out,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def _write_config(source: Path, out: Path, entries: Mapping[str, Any]) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write_json(out / "config.json", {**config, "quantization_config": entries})


def _copy_others(source: Path, out: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in NOT_COPIED:
            shutil.copyfile(path, out / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
