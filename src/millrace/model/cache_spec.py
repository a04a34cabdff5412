"""What memory a model's layers need between steps: for each page, each slot, each cached prefix.

Every layer says it once, as `Buffer`s. Sizing, allocation, snapshots, doctor, and whatever
moves a prefix elsewhere read it from here. It needs no torch, and it knows no weights and no
requests. Buffers are those of the whole model; methods that take `ranks` give one rank's share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from millrace.config import EngineConfig

DTYPE_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int64": 8, "int32": 4,
}  # fmt: skip
CONV_KERNEL = 4
CONV_INPUTS = CONV_KERNEL - 1  # of a causal convolution: inputs that the next token needs

Kind = Literal["kv", "state", "window", "conv", "hidden", "index"]
LayerKind = Literal["attention", "gated_delta"]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What the layers' memory depends on besides the model.

    dtype: of the model; the others: of keys and values, and of recurrent states. page_size: tokens.
    max_pages: of one sequence. drafts: k, tokens that a step verifies beside one. window: W, rows
    of the recurrent window. draft_head: whether the model's own head makes the drafts.
    fixed_windows: windows begin at multiples of W, so a record has what is in them.
    """

    dtype: str
    kv_dtype: str
    state_dtype: str
    page_size: int
    max_pages: int
    drafts: int
    window: int
    draft_head: bool
    fixed_windows: bool = False

    @classmethod
    def of(cls, config: EngineConfig) -> CacheOptions:
        """Those of an engine."""
        return cls(
            dtype=config.dtype,
            kv_dtype=config.kv_dtype,
            state_dtype=config.state_dtype,
            page_size=config.page_size,
            max_pages=config.max_pages_per_request,
            drafts=config.drafts,
            window=config.window,
            draft_head=config.speculation.head == "mtp",
            fixed_windows=config.args.batch_invariant,
        )


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a buffer.

    parts: sizes of what lies one after another along it (a convolution's queries, keys, values).
    split: each part is divided over the ranks. With more ranks than a part has entries, several
    ranks have the same entry.
    """

    name: str
    parts: tuple[int, ...]
    split: bool = False

    def size(self, ranks: int = 1) -> int:
        """Entries on one rank."""
        return sum(self.parts) if not self.split else sum(max(1, p // ranks) for p in self.parts)

    def share(self, rank: int, ranks: int) -> Ranges:
        """The entries of the whole model's axis that a rank has, in the order that it has them."""
        found, first = [], 0
        for part in self.parts:
            each = max(1, part // ranks) if self.split else part
            start = first + rank * part // ranks if self.split else first
            found.append((start, start + each))
            first += part
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One tensor of a layer, as each page or each slot has it.

    axes: slowest first. recorded: entries of the first axis, from its front, that the record of a
    prefix keeps; None: all; 0: the record does without it.
    """

    name: str
    kind: Kind
    dtype: str
    axes: tuple[Axis, ...]
    recorded: int | None = None

    @property
    def form(self) -> tuple[object, ...]:
        """Buffers of pages of one form lie in one stack."""
        return self.dtype, self.axes

    def shape(self, ranks: int = 1) -> tuple[int, ...]:
        return tuple(axis.size(ranks) for axis in self.axes)

    def recorded_shape(self, ranks: int = 1) -> tuple[int, ...]:
        """What a record keeps of it; all axes are there even if nothing is kept."""
        shape = self.shape(ranks)
        return shape if self.recorded is None else (self.recorded, *shape[1:])

    def bytes(self, ranks: int = 1) -> int:
        return math.prod(self.shape(ranks)) * DTYPE_BYTES[self.dtype]

    def recorded_bytes(self, ranks: int = 1) -> int:
        return math.prod(self.recorded_shape(ranks)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The memory of one layer. name: `layers.N` or `draft`; kind: which record of
    `kernels/batch.py` its tensors are in, by the buffers' names."""

    name: str
    kind: LayerKind
    per_page: tuple[Buffer, ...] = ()
    per_slot: tuple[Buffer, ...] = ()


class RecordPart(NamedTuple):
    """One tensor of the record of a prefix, on one rank.

    layer: as in LayerCache; `model` for what no layer has. per_page: it is there once for each page
    of the prefix; else once. layout: names of the axes, slowest first. share: for each axis, which
    entries of the whole model's axis these are, so that other ranks can cut out theirs.
    """

    layer: str
    name: str
    kind: Kind
    dtype: str
    per_page: bool
    bytes: int
    layout: tuple[str, ...]
    shape: tuple[int, ...]
    share: tuple[Ranges, ...]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The memory of a model. layers: in the model's order. draft: the draft head's. hidden: the
    vector of the last token, which a draft head needs to continue; None without one. draft_model:
    the layers of a draft model."""

    options: CacheOptions
    layers: tuple[LayerCache, ...]
    draft: LayerCache | None = None
    hidden: Buffer | None = None
    draft_model: tuple[LayerCache, ...] = ()

    @property
    def index(self) -> tuple[Buffer, ...]:
        """What each slot has beside the layers' memory: its pages, and where its window stands."""
        pages = Buffer(
            "block_table", "index", "int32", (Axis("page", (self.options.max_pages,)),), 0
        )
        return pages, *(Buffer(name, "index", "int32", (), 0) for name in ("fill", "conv_offset"))

    def all_layers(self) -> tuple[LayerCache, ...]:
        """With the drafter's."""
        head = () if self.draft is None else (self.draft,)
        return (*self.layers, *head, *self.draft_model)

    # --- bytes on one rank --------------------------------------------------------------------

    def page_bytes(self, ranks: int = 1) -> int:
        """Of one page, in all layers."""
        return sum(b.bytes(ranks) for layer in self.all_layers() for b in layer.per_page)

    def slot_bytes(self, ranks: int = 1) -> int:
        """Of one slot, in all layers, with its index."""
        layers = sum(b.bytes(ranks) for layer in self.all_layers() for b in layer.per_slot)
        return layers + sum(buffer.bytes() for buffer in self.index)

    def snapshot_bytes(self, ranks: int = 1) -> int:
        """Of one snapshot: the record of a prefix without its pages."""
        return sum(part.bytes for part in self.record(0, ranks) if not part.per_page)

    # --- records of prefixes ------------------------------------------------------------------

    @property
    def needs_snapshots(self) -> bool:
        """Whether a prefix is more than its pages, so that it can be resumed only where the rest
        was saved."""
        return self.snapshot_bytes() > 0

    def record(self, rank: int = 0, ranks: int = 1) -> list[RecordPart]:
        """All that a rank needs to continue from the end of a prefix, layer by layer."""
        parts = []
        for layer in self.all_layers():
            parts += [_part(layer.name, b, True, rank, ranks) for b in layer.per_page]
            kept = [b for b in layer.per_slot if b.recorded != 0]
            parts += [_part(layer.name, b, False, rank, ranks) for b in kept]
        if self.hidden is not None:
            parts.append(_part("model", self.hidden, False, rank, ranks))
        return parts

    def windows(self) -> dict[str, list[Buffer]]:
        """The buffers of slots that no record keeps, as `stacks` has the others."""
        found: dict[str, list[Buffer]] = {}
        for layer in self.all_layers():
            for buffer in layer.per_slot:
                if buffer.recorded == 0:
                    found.setdefault(buffer.name, []).append(buffer)
        return found

    def stacks(self) -> dict[str, list[Buffer]]:
        """The buffers of slots that records keep, by name, in the order of their layers: one tensor
        for all layers, so that one copy saves them. Those of one name have one shape and dtype."""
        found: dict[str, list[Buffer]] = {}
        for layer in self.all_layers():
            for buffer in layer.per_slot:
                if buffer.recorded != 0:
                    found.setdefault(buffer.name, []).append(buffer)
        assert all(len(set(same)) == 1 for same in found.values())
        return found

    def page_forms(self) -> dict[tuple[object, ...], tuple[Buffer, int]]:
        """The forms of the layers' buffers of pages: a buffer of each, and how many there are."""
        found: dict[tuple[object, ...], tuple[Buffer, int]] = {}
        for layer in self.all_layers():
            for buffer in layer.per_page:
                _, count = found.get(buffer.form, (buffer, 0))
                found[buffer.form] = buffer, count + 1
        return found


def _part(layer: str, buffer: Buffer, per_page: bool, rank: int, ranks: int) -> RecordPart:
    shape = buffer.recorded_shape(ranks)
    share = [axis.share(rank, ranks) for axis in buffer.axes]
    if buffer.recorded is not None:
        share[0] = ((0, buffer.recorded),)
    layout = tuple(axis.name for axis in buffer.axes)
    return RecordPart(
        layer, buffer.name, buffer.kind, buffer.dtype, per_page, buffer.recorded_bytes(ranks),
        layout, shape, tuple(share),
    )  # fmt: skip


# --- layers ------------------------------------------------------------------------------------


def attention_cache(name: str, options: CacheOptions, kv_heads: int, head_dim: int) -> LayerCache:
    """Keys and values of one attention layer."""
    axes = (
        Axis("token", (options.page_size,)),
        Axis("head", (kv_heads,), split=True),
        Axis("dim", (head_dim,)),
    )
    pair = (Buffer(which, "kv", options.kv_dtype, axes) for which in ("keys", "values"))
    return LayerCache(name, "attention", per_page=tuple(pair))


def gated_delta_cache(
    name: str,
    options: CacheOptions,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
) -> LayerCache:
    """State, window and convolution inputs of one Gated DeltaNet layer.

    A window is folded into the state before a record is made, unless windows begin at fixed
    positions: a record then has it, too, and its keys are float32. Of the convolution's inputs the
    last 3 are kept, which then lie in front.
    """
    keys, values = Axis("key_head", (key_heads,), True), Axis("value_head", (value_heads,), True)
    key, value = Axis("key_dim", (key_dim,)), Axis("value_dim", (value_dim,))
    row = Axis("row", (options.window,))
    recorded, key_dtype = (None, "float32") if options.fixed_windows else (0, options.dtype)
    width = key_heads * key_dim
    inputs = Axis("input", (CONV_INPUTS + options.drafts,))
    channels = Axis("channel", (width, width, value_heads * value_dim), True)
    return LayerCache(
        name,
        "gated_delta",
        per_slot=(
            Buffer("state", "state", options.state_dtype, (values, key, value)),
            Buffer("window_k", "window", key_dtype, (keys, row, key), recorded),
            Buffer("window_u", "window", "float32", (values, row, value), recorded),
            Buffer("window_g", "window", "float32", (values, row), recorded),
            Buffer("conv", "conv", options.dtype, (inputs, channels), CONV_INPUTS),
        ),
    )


def hidden_vector(options: CacheOptions, hidden_size: int) -> Buffer:
    """The last token's vector after the final norm, whole on every rank."""
    return Buffer("hidden", "hidden", options.dtype, (Axis("channel", (hidden_size,)),))
