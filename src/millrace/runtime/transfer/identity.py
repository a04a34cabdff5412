"""What two engines must have in common so that a record of one is of use to the other.

It is exchanged before the first record. Where it differs, both values are named.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path

import msgspec

from millrace.config import EngineConfig
from millrace.model.cache_spec import CacheSpec, RecordPart
from millrace.version import __version__

PROTOCOL = 2
_SAMPLES, _SAMPLE = 16, 64 << 10  # of each file of weights, to tell them apart
_MOST_SHOWN = 160  # characters of a value in a message


class Part(msgspec.Struct, frozen=True, array_like=True):
    """As `RecordPart`, of the whole model."""

    layer: str
    name: str
    dtype: str
    layout: list[str]
    shape: list[int]

    def __str__(self) -> str:
        shape = " x ".join(
            f"{size} {axis}" for axis, size in zip(self.layout, self.shape, strict=False)
        )
        return f"{self.layer} {self.name} {self.dtype} [{shape}]"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. model: what tells its weights from others. drafter: what drafts from a memory
    of its own. ranks: that share the model; each has its part of the record. record: the parts of
    the whole one, in order.

    How many drafts a step verifies is not in it: no part of a record depends on that.
    """

    protocol: int
    version: str
    model: list[str]
    overrides: str
    dtype: str
    batch_invariant: bool
    page_size: int
    drafter: str
    ranks: int
    record: list[Part]

    @classmethod
    def of(cls, config: EngineConfig, spec: CacheSpec, model: Path, ranks: int = 1) -> Identity:
        """That of an engine. model: its directory."""
        args, speculation = config.args, config.speculation
        dummy = args.load_format == "dummy"
        return cls(
            protocol=PROTOCOL,
            version=__version__,
            model=[f"random weights of seed {args.seed}"] if dummy else weights_of(model),
            overrides=msgspec.json.encode(args.hf_overrides, order="sorted").decode(),
            dtype=config.dtype,
            batch_invariant=config.args.batch_invariant,
            page_size=config.page_size,
            drafter=" ".join([speculation.head or "none", *_drafter(speculation.model)]),
            ranks=ranks,
            record=[_part(part) for part in spec.record()],
        )

    def differences(self, other: Identity) -> list[str]:
        """Each with both values; empty if records of the other can be used here."""
        found = [
            f"{name}: {_shown(theirs)} there, {_shown(mine)} here"
            for name in (
                "protocol",
                "version",
                "overrides",
                "dtype",
                "batch_invariant",
                "page_size",
                "drafter",
            )
            if (theirs := getattr(other, name)) != (mine := getattr(self, name))
        ]
        found += _lists("model", other.model, self.model)
        if max(other.ranks, self.ranks) % min(other.ranks, self.ranks):
            found.append(
                f"ranks: {other.ranks} there, {self.ranks} here; one number must divide the other"
            )
        return [*found, *_lists("record", other.record, self.record)]


def _drafter(model: str | None) -> list[str]:
    return weights_of(Path(model)) if model else []


def _part(part: RecordPart) -> Part:
    return Part(part.layer, part.name, part.dtype, list(part.layout), list(part.shape))


def _lists(
    name: str, theirs: list[Part] | list[str], mine: list[Part] | list[str]
) -> Iterator[str]:
    """The first difference of two lists."""
    for there, here in zip_longest(theirs, mine, fillvalue="none"):
        if there != here:
            yield f"{name}: {_shown(there)} there, {_shown(here)} here"
            return


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def weights_of(model: Path) -> list[str]:
    """What tells one checkpoint from another: its configuration, and samples of its weights."""
    names = sorted([*model.glob("config.json"), *model.glob("*.safetensors")])
    return [f"{path.name} {_fingerprint(path)}" for path in names]


def _fingerprint(path: Path) -> str:
    hasher, size = blake2b(digest_size=16), path.stat().st_size
    hasher.update(str(size).encode())
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(sample * max(0, size - _SAMPLE) // (_SAMPLES - 1))
            hasher.update(file.read(_SAMPLE))
    return hasher.hexdigest()
