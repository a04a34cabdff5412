"""Fills a model's parameters: from a Hugging Face checkpoint, or with seeded random numbers.

Every parameter knows the checkpoint tensors that it is made of (`parameter.py`). So this module
knows files, names, shapes and dtypes, but no layer. Tensors are read one at a time, and only the
part that this rank needs.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from millrace.errors import CheckpointError
from millrace.kernels.gemm import dequantize
from millrace.model.config import ModelConfig
from millrace.model.parameter import Piece, full_tensor, parameters_with_pieces
from millrace.model.qwen3_5 import build_model

INDEX = "model.safetensors.index.json"
FLOATS = {"F32", "BF16", "F16"}
FP8 = {"F8_E4M3"}
MAX_LISTED = 20
FP8_SPREAD = 64.0  # standard deviation of random e4m3 weights: well within their range


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The shape of a checkpoint tensor, and the dtypes that are accepted (safetensors names)."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]


# --- expected tensors -------------------------------------------------------------------------


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this configuration, by flat name, draft head included."""
    model = build_model(config, dtype=torch.bfloat16, device="meta", max_len=1, mtp=True)
    return _expected(model)


def _expected(model: nn.Module) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for param, pieces in parameters_with_pieces(model):
        kept = param.dtype == torch.float8_e4m3fn
        for piece in pieces:
            fp8 = kept or piece.quantized
            found[piece.name] = TensorSpec(piece.shape, frozenset(FP8 if fp8 else FLOATS))
            if piece.quantized:
                scale = full_tensor(piece.name, *piece.shape).scale()
                assert scale is not None
                found[scale.name] = TensorSpec(scale.shape, frozenset(FLOATS))
    return found


def flat_name(name: str) -> str | None:
    """The flat name of a checkpoint tensor; None for tensors that the text model does not use."""
    if name.startswith("model.visual."):
        return None
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


# --- loading -----------------------------------------------------------------------------------


class Checkpoint:
    """The open files of one checkpoint directory; a context manager.

    tensors: flat name -> (file, name in the file). Raises CheckpointError if a file is missing,
    truncated or no safetensors file.
    """

    def __init__(self, directory: str | Path) -> None:
        self._stack = ExitStack()
        self.tensors: dict[str, tuple[Any, str]] = {}
        for path in _files(Path(directory)):
            handle = self._open(path)
            for name in handle.keys():  # noqa: SIM118, the handle is no mapping
                flat = flat_name(name)
                if flat is not None:
                    self.tensors[flat] = (handle, name)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self, path: Path) -> Any:
        if not path.is_file():
            raise CheckpointError(f"{path} is named in {INDEX} but is missing")
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file ({error}); fetch it again"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        handle, key = self.tensors[name]
        return tuple(handle.get_slice(key).get_shape())

    def dtype(self, name: str) -> str:
        handle, key = self.tensors[name]
        return str(handle.get_slice(key).get_dtype())

    def read(self, piece: Piece) -> Tensor:
        """The part of a tensor that `piece` names, its row ranges concatenated, without padding."""
        handle, key = self.tensors[piece.name]
        if piece.is_full:
            return _as_tensor(handle.get_tensor(key))
        part = handle.get_slice(key)
        if piece.columns is None:
            pieces = [part[start:stop] for start, stop in piece.rows]
        else:
            left, right = piece.columns
            pieces = [part[start:stop, left:right] for start, stop in piece.rows]
        return _as_tensor(pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def read_dequantized(self, piece: Piece) -> Tensor:
        """As `read`, dequantized to float32. Ranges may cut blocks."""
        weight = full_tensor(piece.name, *self.shape(piece.name))
        scale = weight.scale()
        assert scale is not None
        full = dequantize(self.read(weight), self.read(scale))
        rows = torch.cat([full[start:stop] for start, stop in piece.rows])
        return rows if piece.columns is None else rows[:, slice(*piece.columns)]


def _as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} cannot be read: {error!r}; fetch it again") from None
        for name in names:
            if not isinstance(name, str) or name in ("", "..") or name != Path(name).name:
                raise CheckpointError(
                    f"{index} names {str(name)[:100]!r}; a shard is a file in the same directory"
                )
        return [directory / name for name in sorted(names)]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{directory} has no *.safetensors files; only these can be read")
    return found


def _no_check() -> None:
    """The default `check`: never raises."""


def load(model: nn.Module, directory: str | Path, check: Callable[[], None] = _no_check) -> None:
    """Fill every parameter of `model` from the checkpoint in `directory`.

    check: called before each parameter; if it raises, loading ends. Names may be flat or nested, in
    one file or many. `model.visual.*` is skipped, and the draft head if the model has none. Before
    anything is read, one CheckpointError names every tensor that is missing, unexpected, or of a
    wrong shape or dtype.
    """
    with Checkpoint(directory) as checkpoint, torch.no_grad():
        _check(checkpoint, model, directory)
        for param, pieces in parameters_with_pieces(model):
            check()
            _fill(param, pieces, checkpoint)


def _fill(param: nn.Parameter, pieces: Iterable[Piece], checkpoint: Checkpoint) -> None:
    """Copy the pieces into the parameter, one behind the other; remaining rows become zero."""
    row = 0
    for piece in pieces:
        target = param[row : row + piece.num_rows]
        row += piece.num_rows
        if piece.pad_rows or piece.pad_columns:
            target.zero_()
            target = target[: piece.taken_rows, : target.shape[1] - piece.pad_columns]
        if not target.numel():
            continue
        dequantized = piece.quantized and param.dtype != torch.float8_e4m3fn
        part = checkpoint.read_dequantized(piece) if dequantized else checkpoint.read(piece)
        target.copy_(part.reshape(target.shape))
        if piece.offset:
            target.add_(piece.offset)
    if row < param.shape[0]:
        param[row:].zero_()


def _check(checkpoint: Checkpoint, model: nn.Module, directory: str | Path) -> None:
    expected = _expected(model)
    problems = [f"missing {name}" for name in expected if name not in checkpoint.tensors]
    for name in checkpoint.tensors:
        if name in expected:
            problems += _mismatch(name, expected[name], checkpoint)
        elif not _ignored(name, expected):
            problems.append(f"unexpected {name} {list(checkpoint.shape(name))}")
    if problems:
        rest = len(problems) - MAX_LISTED
        listed = problems if rest <= 0 else [*problems[:MAX_LISTED], f"and {rest} more"]
        raise CheckpointError(f"{directory} does not match its config.json: {'; '.join(listed)}")


def _mismatch(name: str, expected: TensorSpec, checkpoint: Checkpoint) -> list[str]:
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    problems = []
    if shape != expected.shape:
        problems.append(f"{name} has shape {list(shape)}, expected {list(expected.shape)}")
    if dtype not in expected.dtypes:
        wanted = " or ".join(sorted(expected.dtypes))
        problems.append(f"{name} has dtype {dtype}, expected {wanted}")
    return problems


def _ignored(name: str, expected: dict[str, TensorSpec]) -> bool:
    """Whether an unexpected tensor is harmless: the draft head, or a tied output head."""
    return name.startswith("mtp.") or (name == "lm_head.weight" and name not in expected)


# --- random weights ----------------------------------------------------------------------------


def random_weights(model: nn.Module, seed: int, check: Callable[[], None] = _no_check) -> None:
    """Fill every parameter with seeded random numbers, scaled as in trained models.

    They are made on the parameters' device. Hardly any is zero, so measured speed is that of real
    weights. Ranks get equal numbers for the pieces that they share. check: as in `load`.
    """
    for param, pieces in parameters_with_pieces(model):
        check()
        first = pieces[0]
        generator = torch.Generator(device=param.device)
        key = f"{seed} {first.name} {first.rows} {first.columns}"
        generator.manual_seed(zlib.crc32(key.encode()))
        randomize(param.data, first.name, generator)
        if first.offset:
            param.data.add_(first.offset)


def randomize(data: Tensor, name: str, generator: torch.Generator) -> None:
    """Fill one checkpoint tensor, or a part of it, in place; the name says what it is."""
    if name.endswith("weight_scale_inv"):
        spread = FP8_SPREAD * math.sqrt(data.shape[1] * 128)
        data.uniform_(0.5, 1.5, generator=generator).div_(spread)
    elif data.dtype == torch.float8_e4m3fn:
        for rows in data.split(4096):  # limits the bfloat16 copy
            draw = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
            rows.copy_(draw.normal_(0, FP8_SPREAD, generator=generator).clamp_(-448, 448))
    elif name.endswith("A_log"):
        data.uniform_(1, 16, generator=generator).log_()
    elif name.endswith("dt_bias"):  # softplus(dt_bias) is then spread over 0.001 .. 0.1
        step = data.uniform_(math.log(0.001), math.log(0.1), generator=generator).exp_()
        step.expm1_().log_()
    elif name.endswith("conv1d.weight"):
        data.uniform_(-0.5, 0.5, generator=generator)
    elif data.dim() == 1:
        center = 1.0 if name.endswith("linear_attn.norm.weight") else 0.0
        data.normal_(center, 0.1, generator=generator)
    else:
        data.normal_(0, 1 / math.sqrt(data.shape[1]), generator=generator)
