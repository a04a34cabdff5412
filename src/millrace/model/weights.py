"""Fills a model's parameters: from a Hugging Face checkpoint, or with seeded random numbers.

Every parameter knows the checkpoint tensors that it is made of (`parameter.py`). So this module
knows files, names, shapes and dtypes, but no layer. Tensors are read one at a time, and only the
part that this rank needs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from millrace.errors import CheckpointError
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import ModelConfig
from millrace.model.parameter import Piece, TensorSpec, parameters_with_pieces
from millrace.model.registry import family_named

INDEX = "model.safetensors.index.json"
MAX_LISTED = 20


# --- expected tensors -------------------------------------------------------------------------


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this configuration, by flat name, draft head included."""
    model = build_model(config, dtype=torch.bfloat16, device="meta", max_len=1, mtp=True)
    return _expected(model)


def _expected(model: nn.Module) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for _, pieces in parameters_with_pieces(model):
        for piece in pieces:
            found |= piece.reader.tensors(piece)
    return found


# --- loading -----------------------------------------------------------------------------------


class Checkpoint:
    """The open files of one checkpoint directory; a context manager.

    flat_name: of a tensor in a file, as in `Family`. tensors: flat name -> (file, name in the
    file). Raises CheckpointError if a file is missing, truncated or no safetensors file.
    """

    def __init__(self, directory: str | Path, flat_name: Callable[[str], str | None]) -> None:
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


def load(model: CausalLM, directory: str | Path, check: Callable[[], None] = _no_check) -> None:
    """Fill every parameter of `model` from the checkpoint in `directory`.

    check: called before each parameter; if it raises, loading ends. Tensors may be in one file or
    many. Before anything is read, one CheckpointError names every tensor that is missing,
    unexpected, or of a wrong shape or dtype.
    """
    family = family_named(model.config.family)
    with Checkpoint(directory, family.flat_name) as checkpoint, torch.no_grad():
        _check(checkpoint, model, directory, family.optional)
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
        part = piece.reader.read(checkpoint, piece)
        target.copy_(part.reshape(target.shape))
        if piece.offset:
            target.add_(piece.offset)
    if row < param.shape[0]:
        param[row:].zero_()


def _check(
    checkpoint: Checkpoint, model: nn.Module, directory: str | Path, optional: tuple[str, ...]
) -> None:
    expected = _expected(model)
    problems = [f"missing {name}" for name in expected if name not in checkpoint.tensors]
    for name in checkpoint.tensors:
        if name in expected:
            problems += _mismatch(name, expected[name], checkpoint)
        elif not _ignored(name, expected, optional):
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


def _ignored(name: str, expected: dict[str, TensorSpec], optional: tuple[str, ...]) -> bool:
    """Whether an unexpected tensor is harmless: optional in the family, or a tied output head."""
    return name.startswith(optional) or (name == "lm_head.weight" and name not in expected)


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
        first.reader.init(first)(param.data, generator)
        if first.offset:
            param.data.add_(first.offset)
