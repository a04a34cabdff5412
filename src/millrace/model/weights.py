"""Fills a model's parameters: from a Hugging Face checkpoint, or with seeded random numbers.

Every parameter knows the checkpoint tensors that it is made of (`parameter.py`). So this module
knows files, names, shapes and dtypes, but no layer. Tensors are read one at a time, and only the
part that this rank needs, in the order in which the files have them.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from millrace.errors import CheckpointError
from millrace.logs.progress import PROGRESS_SECONDS, Due
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import ModelConfig
from millrace.model.family import Family
from millrace.model.parameter import (
    Piece,
    Range,
    StoredPart,
    TensorSpec,
    parameters_with_pieces,
)
from millrace.model.registry import family_named

INDEX = "model.safetensors.index.json"
MAX_LISTED = 20
REPORT_EVERY = PROGRESS_SECONDS
logger = logging.getLogger(__name__)


# --- expected tensors -------------------------------------------------------------------------


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this configuration, by flat name, draft head included."""
    model = build_model(config, dtype=torch.bfloat16, device="meta", max_len=1, mtp=True)
    return _expected(model)


def _of_all_ranks(model: CausalLM) -> dict[str, TensorSpec]:
    """What a checkpoint must have: what this rank reads, and the experts of others."""
    if not model.head.tp.whole_experts:
        return _expected(model)
    mtp, dtype = model.mtp is not None, torch.bfloat16
    return _expected(build_model(model.config, dtype=dtype, device="meta", max_len=1, mtp=mtp))


def _expected(model: nn.Module) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for _, pieces in parameters_with_pieces(model):
        for piece in pieces:
            found |= piece.reader.tensors(piece)
    return found


# --- loading -----------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a weight is: a tensor of a file, or part of one."""

    file: Any
    key: str
    part: StoredPart | None


class Checkpoint:
    """The open files of one checkpoint directory; a context manager.

    names: flat names of all weights, in the order of the files. A tensor that holds several weights
    (`Family.parts`) has their names. unused: names, as in the files, of tensors that the family has
    no use for. Raises CheckpointError if a file is missing, truncated or no safetensors file.
    """

    def __init__(self, directory: str | Path, family: Family) -> None:
        self._stack = ExitStack()
        self._places: dict[str, _Place] = {}
        self._unused: dict[str, Any] = {}
        for path in _files(Path(directory)):
            handle = self._open(path)
            for key in handle.offset_keys():
                flat = family.flat_name(key)
                if flat is None:
                    self._unused[key] = handle
                else:
                    self._add(handle, key, flat, family)

    def _add(self, handle: Any, key: str, flat: str, family: Family) -> None:
        shape = tuple(handle.get_slice(key).get_shape())
        parts = family.parts(flat, shape)
        if parts is None:
            self._places[flat] = _Place(handle, key, None)
            return
        for part in parts:
            self._places[part.name] = _Place(handle, key, part)

    @property
    def names(self) -> Iterable[str]:
        return self._places.keys()

    @property
    def unused(self) -> Iterable[str]:
        return self._unused.keys()

    def read_unused(self, name: str) -> Tensor:
        return _as_tensor(self._unused[name].get_tensor(name))

    def name_in_file(self, name: str) -> str:
        """The name as the file has it; of an expert in a tensor of several, as if it were apart."""
        _, key, part = self._places[name]
        if part is None:
            return key
        return f"{key.rpartition('.experts.')[0]}.experts.{name.rpartition('.experts.')[2]}"

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
        handle, key, part = self._places[name]
        stored = tuple(handle.get_slice(key).get_shape())
        return stored if part is None else (part.rows[1] - part.rows[0], *stored[2:])

    def dtype(self, name: str) -> str:
        handle, key, _ = self._places[name]
        return str(handle.get_slice(key).get_dtype())

    def has(self, name: str) -> bool:
        return name in self._places

    def read(self, piece: Piece) -> Tensor:
        """The part of a tensor that `piece` names, its row ranges concatenated, without padding."""
        handle, key, part = self._places[piece.name]
        if piece.is_full and part is None:
            return _as_tensor(handle.get_tensor(key))
        stored = handle.get_slice(key)
        taken = [_rows(stored, part, rows, piece.columns) for rows in piece.rows]
        return taken[0] if len(taken) == 1 else torch.cat(taken)


def _rows(stored: Any, part: StoredPart | None, rows: Range, columns: Range | None) -> Tensor:
    """Rows and columns of a weight that a file has as a tensor, or as part of one."""
    across = slice(None) if columns is None else slice(*columns)
    if part is not None:
        first = part.rows[0]
        one = slice(part.index, part.index + 1)
        return _as_tensor(stored[one, first + rows[0] : first + rows[1], across])[0]
    if columns is None:
        return _as_tensor(stored[rows[0] : rows[1]])
    return _as_tensor(stored[rows[0] : rows[1], across])


def _as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def tensor_names(directory: Path) -> list[str]:
    """The names of all tensors, as the files have them; none if there are no files, or if they
    cannot be read: what is wrong with them is said when they are loaded."""
    try:
        index = directory / INDEX
        if index.is_file():
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names: list[str] = []
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names += file.keys()
        return names
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


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

    check: called before each tensor; if it raises, loading ends. Tensors may be in one file or
    many, which are read from front to back. Before anything is read, one CheckpointError names
    every tensor that is missing, unexpected, or of a wrong shape or dtype.
    """
    family, unused = family_named(model.config.family), model.config.quantization.unused
    load_module(model, family, directory, check, _of_all_ranks(model), unused)


def load_module(
    model: nn.Module,
    family: Family,
    directory: str | Path,
    check: Callable[[], None] = _no_check,
    expected: dict[str, TensorSpec] | None = None,
    unused: Collection[str] = (),
) -> None:
    """As `load`, for any module. family: says how tensors are named. expected: what a checkpoint
    has; None: what the module needs. unused: last parts of names that may be there."""
    expected = _expected(model) if expected is None else expected
    with Checkpoint(directory, family) as checkpoint, torch.no_grad():
        _check(checkpoint, expected, unused, directory, family.optional)
        place = {name: index for index, name in enumerate(checkpoint.names)}

        def first_place(target: tuple[Tensor, Piece]) -> int:
            piece = target[1]
            return min(place[name] for name in piece.reader.tensors(piece) if name in place)

        for target, piece in _reported(sorted(_targets(model), key=first_place)):
            check()
            _fill(target, piece, checkpoint)


def _reported(targets: list[tuple[Tensor, Piece]]) -> Iterator[tuple[Tensor, Piece]]:
    """The targets one by one; long loads are logged now and then."""
    total = sum(target.nbytes for target, _ in targets)
    done = 0
    began, due = time.monotonic(), Due(REPORT_EVERY)
    for target, piece in targets:
        if due:
            speed = done / (time.monotonic() - began)
            logger.info(
                "%.1f of %.1f GiB of weights are loaded (%.0f%%, %.2f GiB/s, about %.0f s to go)",
                done / 2**30, total / 2**30, 100 * done / total, speed / 2**30,
                (total - done) / speed if speed else 0,
            )  # fmt: skip
        yield target, piece
        done += target.nbytes


def _targets(model: nn.Module) -> Iterator[tuple[Tensor, Piece]]:
    """The memory of each piece: in a parameter they lie one behind the other. What remains of a
    parameter becomes zero."""
    for param, pieces in parameters_with_pieces(model):
        row = 0
        for piece in pieces:
            yield param[row : row + piece.num_rows], piece
            row += piece.num_rows
        if row < param.shape[0]:
            param[row:].zero_()


def _fill(target: Tensor, piece: Piece, checkpoint: Checkpoint) -> None:
    if piece.pad_rows or piece.pad_columns:
        target.zero_()
        target = target[: piece.taken_rows, : target.shape[1] - piece.pad_columns]
    if not target.numel():
        return
    part = piece.reader.read(checkpoint, piece)
    target.copy_(part.reshape(target.shape))
    if piece.offset:
        target.add_(piece.offset)


def _check(
    checkpoint: Checkpoint,
    expected: dict[str, TensorSpec],
    unused: Collection[str],
    directory: str | Path,
    optional: tuple[str, ...],
) -> None:
    have = set(checkpoint.names)
    missing = [name for name, spec in expected.items() if name not in have and not spec.optional]
    problems = [f"missing {name}" for name in missing]
    for name in checkpoint.names:
        if name in expected:
            problems += _mismatch(name, expected[name], checkpoint)
        elif not _ignored(name, expected, optional) and name.rpartition(".")[2] not in unused:
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
