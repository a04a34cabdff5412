"""When requests of the background run: batch work that must not slow down the streams of users.

While any other request runs or waits, a step has one row of the background for each ROWS other
rows, and no prompt of it. So that batches do not stand still, one step in STEPS is theirs alone:
too few for streams to notice at their 99th percentile. Without other requests the background has
every step. Which requests those are, the scheduler knows.
"""

from __future__ import annotations

from enum import Enum

ROWS = 16
STEPS = 128


class Turn(Enum):
    """Whose step it is."""

    ALL = "all"
    FOREGROUND = "foreground"
    BACKGROUND = "background"

    def bars(self, background: bool) -> bool:
        """Whether prompts of this sort are not computed in the step."""
        return self is (Turn.FOREGROUND if background else Turn.BACKGROUND)


def rows_beside(rows: int) -> int:
    """Rows of the background in a step that has so many others."""
    return rows // ROWS


class Turns:
    """Chooses the turn of each step."""

    def __init__(self) -> None:
        self._waited = 0  # steps since the background had one of its own

    def choose(self, foreground: bool, background: bool) -> Turn:
        """The turn of the next step. foreground, background: whether there are such requests."""
        if not (foreground and background):
            self._waited = 0
            return Turn.ALL
        self._waited += 1
        if self._waited < STEPS:
            return Turn.FOREGROUND
        self._waited = 0
        return Turn.BACKGROUND
