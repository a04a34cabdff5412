"""What a report is made of: steps, each with the server that it needs and the work that it does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from millrace.common.http_client import Target
from millrace.report.steps.profiles import Profile


class AbsentError(Exception):
    """A step cannot be done here; the message says why. The report says so, and goes on."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What steps need to know of a model. longest: tokens that it takes, None where its config does
    not say. drafts: whether it has a head that drafts. text_only: whether its config knows no
    vision. vocabulary: its size."""

    name: str
    directory: Path
    longest: int | None
    drafts: bool
    text_only: bool


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """A server: a name for its log, its command without address, and what is added to its
    environment. Two steps with equal servings share one start."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a step works. target: its server, None for a step without one. directory: of the
    report. start_limit: seconds that a server has to start. say: writes a line for the user."""

    target: Target | None
    directory: Path
    model: ModelFacts
    profile: Profile
    stop: asyncio.Event | None
    start_limit: float
    say: Callable[[str], None]

    @property
    def url(self) -> str:
        assert self.target is not None
        return str(self.target)

    def folder(self, name: str) -> Path:
        """A folder of the report's directory."""
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        return path


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest part that is measured at once. name: also of its file. seconds: an estimate,
    without the start of a server. command: what anybody would run to do the same. work: returns the
    result; raises AbsentError, or UserError for what failed. needs: names of steps before it."""

    name: str
    section: str
    seconds: float
    work: Callable[[Place], Awaitable[Any]]
    command: tuple[str, ...] = ()
    serving: Serving | None = None
    needs: tuple[str, ...] = ()
