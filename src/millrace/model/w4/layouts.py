"""How checkpoints store a weight [N, K] of 4 bits: names, shapes and the order of their bits.

A layout knows the tensors of one weight, and turns them into what a `W4` has (`kernels/gemm.py`):
codes by rows, scales, zeros and a factor. It knows no config.json and no linear layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from millrace.kernels.gemm import CODES_PER_WORD, pack
from millrace.model.initializers import Initializer, in_bfloat16
from millrace.model.parameter import FLOATS, Piece, Range, TensorFile, TensorSpec, full_tensor

INT32, INT64 = frozenset({"I32"}), frozenset({"I64"})
BYTES, FLOAT32, E4M3 = frozenset({"U8"}), frozenset({"F32"}), frozenset({"F8_E4M3"})
IN_ORDER = tuple(range(CODES_PER_WORD))
# Where in a word AWQ has output 0, 1, .. of eight: its words hold 0, 2, 4, 6, 1, 3, 5, 7.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
SPREAD_OF_CODES, SPREAD_OF_E2M1 = 4.6, 2.9  # standard deviations of random codes' values


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one weight: its module's name, outputs N, inputs K, and columns of a group."""

    module: str
    outputs: int
    inputs: int
    group: int

    @property
    def groups(self) -> int:
        return -(-self.inputs // self.group)


Rows = tuple[Range, ...]


class Layout(ABC):
    """What is read has the rows of the ranges, one behind the other, and all columns.

    mark: how the name of a tensor ends that a module has if, and only if, its weight is in this
    layout. floats: codes are E2M1 numbers. has_zeros: groups have zeros; else that of all codes is
    8. in_order: column k is in group k // group.
    """

    mark: str
    floats: bool = False
    has_zeros: bool = False
    in_order: bool = True

    @abstractmethod
    def tensors(self, of: Shape) -> dict[str, TensorSpec]:
        """Every tensor of the weight, by flat name."""

    @abstractmethod
    def codes(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        """int32 [rows, K / 8], as in `W4`."""

    @abstractmethod
    def scales(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        """[rows, groups], of any float dtype."""

    def zeros(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        """uint8 [rows, groups], if the layout `has_zeros`."""
        raise NotImplementedError

    def factor(self, files: TensorFile, of: Shape) -> Tensor | None:
        """Of all scales, float32 [1]; None: 1."""
        return None

    def group_of(self, files: TensorFile, of: Shape) -> Tensor | None:
        """int32 [K], the group of each column, if it is stored."""
        return None


# --- GPTQ and AWQ -------------------------------------------------------------------------------


@dataclass(frozen=True)
class GptqLayout(Layout):
    """Words of eight inputs of an output. zero_less_one: zeros are stored as z - 1 (version 1)."""

    mark: str = ".qweight"
    has_zeros: bool = False
    in_order: bool = True
    zero_less_one: bool = True

    def tensors(self, of: Shape) -> dict[str, TensorSpec]:
        zeros = _same_words(7 if self.zero_less_one else 8)
        return {
            f"{of.module}.qweight": TensorSpec(_word_rows(of), INT32, random_words),
            f"{of.module}.qzeros": TensorSpec(
                (of.groups, _words(of.outputs)), INT32, random_words if self.has_zeros else zeros
            ),
            f"{of.module}.scales": TensorSpec(
                (of.groups, of.outputs), FLOATS, random_scales(of.inputs)
            ),
            f"{of.module}.g_idx": TensorSpec(
                (of.inputs,), INT32, _groups_of_columns(of, self.in_order), optional=self.in_order
            ),
        }

    def codes(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        return columns_as_rows(files, f"{of.module}.qweight", _word_rows(of), rows)

    def scales(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        return columns_as_rows(files, f"{of.module}.scales", (of.groups, of.outputs), rows)

    def zeros(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        shape = of.groups, _words(of.outputs)
        stored = columns_as_rows(files, f"{of.module}.qzeros", shape, rows, IN_ORDER)
        return stored + 1 if self.zero_less_one else stored

    def group_of(self, files: TensorFile, of: Shape) -> Tensor | None:
        name = f"{of.module}.g_idx"
        return files.read(full_tensor(name, of.inputs)) if files.has(name) else None


@dataclass(frozen=True)
class AwqLayout(Layout):
    """Words of eight outputs of an input, in AWQ's order."""

    mark: str = ".qweight"
    has_zeros: bool = True

    def tensors(self, of: Shape) -> dict[str, TensorSpec]:
        words = _words(of.outputs)
        return {
            f"{of.module}.qweight": TensorSpec((of.inputs, words), INT32, random_words),
            f"{of.module}.qzeros": TensorSpec(
                (of.groups, words), INT32, random_words if self.has_zeros else _same_words(8)
            ),
            f"{of.module}.scales": TensorSpec(
                (of.groups, of.outputs), FLOATS, random_scales(of.inputs)
            ),
        }

    def codes(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        shape = of.inputs, _words(of.outputs)
        return pack(columns_as_rows(files, f"{of.module}.qweight", shape, rows, AWQ_PLACES))

    def scales(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        return columns_as_rows(files, f"{of.module}.scales", (of.groups, of.outputs), rows)

    def zeros(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        shape = of.groups, _words(of.outputs)
        return columns_as_rows(files, f"{of.module}.qzeros", shape, rows, AWQ_PLACES)


# --- compressed-tensors, ModelOpt ---------------------------------------------------------------


@dataclass(frozen=True)
class PackedLayout(Layout):
    """Words of eight inputs of an output, by rows: "pack-quantized" of compressed-tensors.

    Codes are values + 8, and so are zeros, of which a word has those of eight outputs.
    """

    mark: str = ".weight_packed"
    has_zeros: bool = False
    in_order: bool = True

    def tensors(self, of: Shape) -> dict[str, TensorSpec]:
        found = {
            f"{of.module}.weight_packed": TensorSpec(
                (of.outputs, _words(of.inputs)), INT32, random_words
            ),
            f"{of.module}.weight_scale": TensorSpec(
                (of.outputs, of.groups), FLOATS, random_scales(of.inputs)
            ),
            f"{of.module}.weight_shape": TensorSpec(
                (2,), INT64, _both(of.outputs, of.inputs), optional=True
            ),
            f"{of.module}.weight_g_idx": TensorSpec(
                (of.inputs,), INT32, _groups_of_columns(of, self.in_order), optional=self.in_order
            ),
        }
        if self.has_zeros:
            found[f"{of.module}.weight_zero_point"] = TensorSpec(
                (_words(of.outputs), of.groups), INT32, random_words
            )
        return found

    def codes(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        name, shape = f"{of.module}.weight_packed", (of.outputs, _words(of.inputs))
        return files.read(Piece(name, shape, rows))

    def scales(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        name, shape = f"{of.module}.weight_scale", (of.outputs, of.groups)
        return files.read(Piece(name, shape, rows))

    def zeros(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        name, shape = f"{of.module}.weight_zero_point", (_words(of.outputs), of.groups)
        every = _by_words(files.read(full_tensor(name, *shape)), IN_ORDER)
        return torch.cat([every[start:stop] for start, stop in rows])

    def group_of(self, files: TensorFile, of: Shape) -> Tensor | None:
        name = f"{of.module}.weight_g_idx"
        return files.read(full_tensor(name, of.inputs)) if files.has(name) else None


@dataclass(frozen=True)
class E2M1Layout(Layout):
    """Bytes of two E2M1 numbers, the lower bits first, by rows: NVFP4 and MXFP4.

    weight: how the name of the codes ends. mark: of the tensor that tells them. power_scales:
    scales are bytes e for 2^(e - 127); else e4m3. factor: how the name of a factor of all scales
    ends, of which one over it counts if `divides`. Its shape is [1], or [] if `is_scalar`.
    """

    floats: bool = True
    mark: str = ".weight_packed"
    weight: str = ".weight_packed"
    power_scales: bool = False
    factor_name: str = ""
    divides: bool = False
    is_scalar: bool = False

    def tensors(self, of: Shape) -> dict[str, TensorSpec]:
        scales = _powers(of.inputs) if self.power_scales else in_bfloat16(_e4m3_scales)
        found = {
            of.module + self.weight: TensorSpec(_pairs(of), BYTES, random_bytes),
            f"{of.module}.weight_scale": TensorSpec(
                (of.outputs, of.groups), BYTES if self.power_scales else E4M3, scales
            ),
        }
        if self.factor_name:
            size = 64 * SPREAD_OF_E2M1 * math.sqrt(of.inputs)  # scales are 64 on average
            found[of.module + self.factor_name] = TensorSpec(
                self._factor_shape, FLOAT32, _same_words(size if self.divides else 1 / size)
            )
        return found

    def codes(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        stored = files.read(Piece(of.module + self.weight, _pairs(of), rows))
        return stored.contiguous().view(torch.int32)

    def scales(self, files: TensorFile, of: Shape, rows: Rows) -> Tensor:
        shape = of.outputs, of.groups
        stored = files.read(Piece(f"{of.module}.weight_scale", shape, rows))
        if self.power_scales:
            return torch.ldexp(torch.ones(stored.shape), stored.int() - 127)
        return stored.half()

    def factor(self, files: TensorFile, of: Shape) -> Tensor | None:
        if not self.factor_name:
            return None
        stored = files.read(Piece(of.module + self.factor_name, self._factor_shape, ((0, 1),)))
        found = stored.float().reshape(1)
        return 1 / found if self.divides else found

    @property
    def _factor_shape(self) -> tuple[int, ...]:
        return () if self.is_scalar else (1,)


# --- parts of layouts ---------------------------------------------------------------------------


def columns_as_rows(
    files: TensorFile,
    name: str,
    shape: tuple[int, int],
    rows: Rows,
    places: tuple[int, ...] | None = None,
) -> Tensor:
    """The columns of a tensor that are in `rows`, as rows.

    places: a column is of words that have eight rows, at these places; the result is uint8 then.
    """
    each = CODES_PER_WORD if places else 1
    first, last = min(rows)[0] // each, -(-max(stop for _, stop in rows) // each)
    found = files.read(Piece(name, shape, ((0, shape[0]),), (first, last))).t()
    if places:
        found = _by_words(found, places)
    base = first * each
    return torch.cat([found[start - base : stop - base] for start, stop in rows]).contiguous()


def _by_words(words: Tensor, places: tuple[int, ...]) -> Tensor:
    """uint8 [8 R, C] of int32 [R, C]; row i of eight is in the bits from 4 * places[i] on."""
    parts = [(words >> 4 * place & 15).to(torch.uint8) for place in places]
    return torch.stack(parts, 1).flatten(0, 1)


def _words(size: int) -> int:
    return -(-size // CODES_PER_WORD)


def _word_rows(of: Shape) -> tuple[int, int]:
    return _words(of.inputs), of.outputs


def _pairs(of: Shape) -> tuple[int, int]:
    return of.outputs, of.inputs // 2


# --- random numbers -----------------------------------------------------------------------------


def random_words(data: Tensor, generator: Generator) -> None:
    """Any bits."""
    data.random_(-(2**31), 2**31 - 1, generator=generator)


def random_bytes(data: Tensor, generator: Generator) -> None:
    data.random_(0, 256, generator=generator)


def random_scales(inputs: int, spread: float = SPREAD_OF_CODES) -> Initializer:
    """Scales that make weights of random codes, whose standard deviation is `spread`, keep the
    size of what they are multiplied with. They have no more bits than bfloat16."""

    def fill(data: Tensor, generator: Generator) -> None:
        data.uniform_(0.5, 1.5, generator=generator).div_(spread * math.sqrt(inputs))
        data.copy_(data.bfloat16())

    return fill


def _same_words(value: float) -> Initializer:
    """Words of eight equal codes; of floats the number itself."""

    def fill(data: Tensor, generator: Generator) -> None:
        code = sum(int(value) << 4 * place for place in IN_ORDER)
        signed = code - 2**32 if code >= 2**31 else code
        data.fill_(value if data.is_floating_point() else signed)

    return fill


def _groups_of_columns(of: Shape, in_order: bool) -> Initializer:
    def fill(data: Tensor, generator: Generator) -> None:
        columns = torch.arange(of.inputs, device=data.device)
        if not in_order:
            columns = torch.randperm(of.inputs, generator=generator, device=data.device)
        data.copy_(columns // of.group)

    return fill


def _both(first: int, second: int) -> Initializer:
    def fill(data: Tensor, generator: Generator) -> None:
        data[0], data[1] = first, second

    return fill


def _powers(inputs: int) -> Initializer:
    middle = 127 - round(math.log2(SPREAD_OF_E2M1 * math.sqrt(inputs)))

    def fill(data: Tensor, generator: Generator) -> None:
        data.random_(middle - 1, middle + 2, generator=generator)

    return fill


def _e4m3_scales(data: Tensor, generator: Generator) -> None:
    data.uniform_(32, 96, generator=generator)
