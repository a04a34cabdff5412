"""What a cache policy decides: what of a prompt is cached, where it can be resumed, and what is
given up when pages run short.

The KV manager and the scheduler know a policy by this interface alone. A policy knows tokens, page
numbers and snapshot numbers; it knows no request and no step. Prompts under different salts share
nothing. A prompt is never matched whole: at least one token is left to compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

NO_SNAPSHOT = -1


class Kind(Enum):
    """What the tokens before a snapshot are: the first turns of a prompt, a whole prompt, or a
    prompt with its answer."""

    TURNS = 0
    PROMPT = 1
    ANSWER = 2


@dataclass(frozen=True, slots=True)
class Match:
    """The cached prefix of a prompt.

    tokens: prompt tokens that `pages`, and `snapshot` if there is one, cover; the last page may be
    covered in part. shared: tokens that an earlier prompt began with too; what lies between the two
    was not cached. kind: of the snapshot.
    """

    tokens: int
    pages: list[int]
    snapshot: int
    shared: int
    kind: Kind | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """known: tokens that some earlier prompt begins with, too. other: how the nearest one goes on.
    evicted: the most of these tokens of which there was a snapshot that was evicted; 0: none."""

    known: int
    other: list[int]
    evicted: int = 0


class CachePolicy(Protocol):
    """See the module. It takes references to pages from the pool that it was built with.

    now: seconds, on the clock of arrivals; the caller sets it. lower_tiers: what is evicted comes
    back from other memory, so little is lost with it. evicted_tags: of prefixes that were evicted
    since somebody emptied the list.
    """

    now: float
    lower_tiers: bool
    evicted_tags: list[int]

    @property
    def version(self) -> int:
        """Grows when it changes what can be resumed."""

    @property
    def snapshots(self) -> tuple[int, int]:
        """(in use, in all)."""

    # --- lookup -----------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """The longest prefix to resume from, which counts as used."""

    def cached(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many tokens `match` would find now. It does not count as a use of them."""

    def locate(self, tokens: Sequence[int], salt: str = "") -> Match | None:
        """The pages and the snapshot of exactly these tokens; None if there is none."""

    def pages_of(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        """The pages of the first whole pages of the tokens, as many as it has."""

    def compare(self, tokens: Sequence[int], salt: str = "") -> Difference:
        """Where the tokens leave every prompt that is known."""

    def can_resume(self, length: int) -> bool:
        """Whether a second prompt of the same `length` tokens could skip some of them."""

    # --- insertion --------------------------------------------------------------------------

    def record_prompt(self, tokens: Sequence[int], salt: str = "") -> None:
        """Note a prompt that is going to be computed."""

    def stops(
        self,
        start: int,
        length: int,
        ends: Iterable[int],
        shared: int,
        resumed: Kind | None = None,
    ) -> list[int]:
        """Where the prefill of a prompt of `length` tokens must stop, nearest last, so that what is
        computed by then can be saved. start: tokens that are cached, behind a snapshot of the kind
        `resumed`. ends: of its chat turns. shared: as in `Match`.
        """

    def begin_save(
        self, tokens: Sequence[int], salt: str = "", *, kind: Kind = Kind.PROMPT
    ) -> int | None:
        """At such a stop behind `tokens`, or at the end of an answer: the snapshot that the step
        writes. None: none is needed, none is free, or those that are there are worth more."""

    def can_save(self) -> bool:
        """Whether a snapshot is free, or one that nothing uses can be evicted for it."""

    def publish(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        snapshot: int,
        salt: str = "",
        *,
        kind: Kind = Kind.PROMPT,
        tag: int = 0,
    ) -> None:
        """Insert tokens (all computed) whose snapshot has been written, or will be before anything
        that is planned later. It takes over the caller's reference to the snapshot.
        """

    def store(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> None:
        """All of tokens have been computed, and lie in `pages`: insert what needs no snapshot."""

    def written(self, tokens: Sequence[int], stops: Sequence[int], salt: str = "") -> int:
        """How many tokens of a prompt will be cached when it has been answered, as far as can be
        told before. stops: where it stops to be saved."""

    def pin(self, tokens: Sequence[int], seconds: tuple[float, float], salt: str = "") -> None:
        """For so long, evict the first and the last place where the tokens can be resumed after
        all others. At most half of all can be pinned at a time; of more the pin has no effect."""

    # --- use --------------------------------------------------------------------------------

    def retain(self, snapshot: int) -> None:
        """A step reads this snapshot: it must not be written until `release`."""

    def release(self, snapshot: int) -> None:
        """Undo `retain`."""

    # --- removal ----------------------------------------------------------------------------

    def evict(self) -> bool:
        """Give up what is worth least, and with it the references to its pages. False: there is
        nothing left."""

    def clear(self) -> None:
        """Give up everything."""

    # --- integrity --------------------------------------------------------------------------

    def cached_pages(self) -> list[int]:
        """Every page that it refers to."""

    def check(self, saving: int = 0) -> None:
        """Raise AssertionError if an invariant is broken. saving: most snapshots that steps write
        or read."""
