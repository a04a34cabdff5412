"""How often drafts are accepted: a property of the text, so there is a table by kind of text.

What no source has measured, deeper drafts of a text, falls with the depth as in the deepest table.
"""

from __future__ import annotations

import functools
import math
from importlib import resources
from itertools import pairwise

import msgspec

from millrace.errors import ConfigError

# A deeper draft is accepted, given those before, less often than the last measured one: 0.82 times
# as often for the write-up's second one, 0.95 for chats.
DECAY = 0.87


class Text(msgspec.Struct, frozen=True):
    """accepted: share of steps in which at least the first i drafts are accepted. spread: standard
    deviation of the first one from text to text of this kind."""

    name: str
    accepted: list[float]
    spread: float
    source: str


class _Table(msgspec.Struct, frozen=True):
    note: str
    texts: list[Text]


@functools.cache
def texts() -> dict[str, Text]:
    """All kinds of text by name."""
    content = resources.files("millrace.plan.facts").joinpath("texts.json").read_bytes()
    return {text.name: text for text in msgspec.json.decode(content, type=_Table).texts}


def text(name: str) -> Text:
    """A kind of text; a number is a text whose every draft is accepted with this probability.

    Raises ConfigError with the names that there are.
    """
    if (found := texts().get(name)) is not None:
        return found
    try:
        share = float(name)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(
            f"unknown text {name!r}; known are {', '.join(texts())}, or a share from 0 to 1"
        )
    return Text(name, [share**i for i in range(1, 6)], 0.0, "given")


def acceptance(name: str, drafts: int) -> tuple[float, ...]:
    """The probability that each of `drafts` drafts is accepted, given that those before it were."""
    found = text(name)
    shares = [1.0, *found.accepted]
    given = [b / a if a else 0.0 for a, b in pairwise(shares)]
    while len(given) < drafts:
        given.append(given[-1] * DECAY)
    return tuple(given[:drafts])


def tokens_per_step(name: str, drafts: int, shift: float = 0.0) -> float:
    """Tokens that a decode row gets in a step, in the mean. shift: of the text, in standard
    deviations."""
    spread = text(name).spread * shift
    given = [min(1.0, max(0.0, share + spread)) for share in acceptance(name, drafts)]
    return 1 + sum(math.prod(given[: i + 1]) for i in range(drafts))
