"""What every task is made of: an item with its question, its answer, and how an answer is graded.

Knows nothing of a particular task, of models or of files. An item depends on (task, split, seed,
index) alone, so any process can make any item without the others.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 8  # one in so many names, and one in so many sums, is never trained on


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its reference answer.

    kind: the sort of question within the task. reasoning: what the reference thinks before it
    answers, for training; it is never graded. tools: as in an OpenAI request.
    """

    task: str
    kind: str
    index: int
    messages: tuple[Mapping[str, Any], ...]
    answer: str
    reasoning: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether the whole answer is right, and each field of it where the task has fields."""

    correct: bool
    fields: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """A generator and its grader. max_tokens: enough for every reference answer."""

    name: str
    make: Callable[[int, int, Split], Item]
    grade: Callable[[Item, str], Grade]
    max_tokens: int


def rng_for(task: str, split: Split, seed: int, index: int) -> random.Random:
    """The stream of one item: the split's name is in the key, so splits share no stream."""
    return random.Random(f"{task}/{split}/{seed}/{index}")


def is_heldout(key: str) -> bool:
    """Whether a value (a name, a sum) belongs to the held-out part, whatever the seed."""
    return zlib.crc32(key.encode()) % HELDOUT_SHARE == 0


def draw(rng: random.Random, split: Split, make: Callable[[random.Random], str]) -> str:
    """A value of `make` that belongs to the split."""
    while True:
        value = make(rng)
        if is_heldout(value) == (split == "heldout"):
            return value


_THINKING = re.compile(r"^.*</think>", re.DOTALL)


def visible(text: str) -> str:
    """The answer without its reasoning, whether or not the server has cut that off already."""
    return _THINKING.sub("", text, count=1).strip()
