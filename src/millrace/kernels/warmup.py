"""What must have run before the first request, because kernels are compiled or loaded for it.

A module of fast paths says so in a function `warmup(limits) -> Warmup`, beside its kernels, since
they know where another kernel begins. The runtime collects what is declared and runs it at the
start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from millrace.kernels.dispatch import fast_modules


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How large steps may be: decode rows of `width` tokens and prompts (`rows` of each at most),
    `tokens` in all, and no sequence longer than `length`."""

    rows: int
    width: int
    tokens: int
    length: int


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step to run. decode: its decode rows, none longer than `context`. prompts: (start, count)
    of each; at least one."""

    decode: int
    prompts: tuple[tuple[int, int], ...]
    context: int = 0


@dataclass(frozen=True, slots=True)
class Warmup:
    """steps: to run once. tokens: of GEMMs, where another kernel may begin, so that what is between
    two of them needs no other than the larger one. snapshots: whether saving and restoring one
    needs kernels of its own."""

    steps: tuple[StepShape, ...] = ()
    tokens: frozenset[int] = frozenset()
    snapshots: bool = False

    def __or__(self, other: Warmup) -> Warmup:
        return Warmup(
            (*self.steps, *other.steps),
            self.tokens | other.tokens,
            self.snapshots or other.snapshots,
        )


def declared(device: str, limits: StepLimits) -> Warmup:
    """What all fast paths of "cpu" or "cuda" need together."""
    found = Warmup()
    for module in fast_modules("gpu" if device == "cuda" else "cpu"):
        declare: Callable[[StepLimits], Warmup] | None = getattr(module, "warmup", None)
        if declare is not None:
            found |= declare(limits)
    return found
