"""What went wrong with a server, told apart by the lines of its own log.

A line of the log is the evidence of every failure that has one. What was being run is not known
here.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from millrace.tune.space.knobs import Risk

FailureKind = Literal[
    "startup_oom", "runtime_oom", "no_room", "illegal_address", "hang", "crash", "failed_requests",
    "lost_accuracy", "refused", "too_long", "interrupted",
]  # fmt: skip
Phase = Literal["start", "run"]

RISKS: dict[FailureKind, Risk] = {
    "startup_oom": "memory",
    "runtime_oom": "memory",
    "no_room": "room",
    "illegal_address": "stability",
    "hang": "stability",
    "crash": "stability",
    "interrupted": "stability",
    "failed_requests": "stability",
    "lost_accuracy": "quality",
    "refused": "refused",
    "too_long": "length",
}

TITLES: dict[FailureKind, str] = {
    "startup_oom": "out of memory at the start",
    "runtime_oom": "out of memory under load",
    "no_room": "no room for the KV cache",
    "illegal_address": "illegal memory access",
    "hang": "hung",
    "crash": "crashed",
    "interrupted": "ended the tuner with it, several times",
    "failed_requests": "failed requests",
    "lost_accuracy": "lost accuracy",
    "refused": "refused by the server",
    "too_long": "too short for a prompt",
}


class Failure(msgspec.Struct, frozen=True):
    """phase: while the server started, or under load. line: of its log, or what was seen."""

    kind: FailureKind
    phase: Phase
    line: str

    @property
    def risk(self) -> Risk:
        return RISKS[self.kind]

    def __str__(self) -> str:
        return f"{TITLES[self.kind]}: {self.line}" if self.line else TITLES[self.kind]


# The first of these that a log matches is the cause; "oom" becomes one of start or run. An engine
# that has too little for its KV cache says so in other words than one that the device refused.
_CAUSES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("no_room",
         r"no available memory for the cache blocks|to serve at least one request"
         r"|larger than the (maximum number|available KV cache)|KV cache (is|are) needed"
         r"|besides the pages of one sequence|at most \d+ fit"
         r"|not enough memory.*mem-fraction-static|max seq(uence)? len.*KV cache"),
        ("illegal_address",
         r"illegal (memory access|address|instruction)|misaligned address|device-side assert"
         r"|unspecified launch failure|\bXid\b|segmentation fault|SIGSEGV|invalid program counter"),
        ("oom",
         r"out of memory|OutOfMemory|CUBLAS_STATUS_ALLOC_FAILED|cannot allocate memory"
         r"|std::bad_alloc|MemoryError|oom-kill|less than desired GPU memory utilization"
         r"|not enough memory|device memory is (full|exhausted)"),
        ("refused",
         r"unrecognized arguments|invalid choice|error: argument|no such option|validation error"
         r"|is not supported|ValidationError|^(\[[^\]]*\] )?millrace[\w -]*: "),
    )
)  # fmt: skip
_LONGEST = 300
_TOO_LONG = re.compile(
    r"maximum (context|model|allowed) length|context_length_exceeded"
    r"|longer than the model.s context|exceeds the (context window|model.s maximum)",
    re.IGNORECASE,
)


def failed_request(answer: str) -> Failure:
    """What a server's answer to a request says: its context may be too short for the prompt."""
    kind: FailureKind = "too_long" if _TOO_LONG.search(answer) else "failed_requests"
    return Failure(kind, "run", answer[:_LONGEST])


class LogReader:
    """Takes a server's lines as they come, and keeps the first one of each cause."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}
        self._last = ""

    def feed(self, line: str) -> None:
        """Take one line."""
        text = " ".join(line.split())
        if not text:
            return
        self._last = text[:_LONGEST]
        for kind, pattern in _CAUSES:
            if kind not in self._lines and pattern.search(text):
                self._lines[kind] = text[:_LONGEST]
                return

    def failure(self, phase: Phase, status: int | None = None) -> Failure:
        """Why a server ended, or failed while it went on. status: of its process, where it ended.

        Of several causes the one that the others follow from.
        """
        for kind, _ in _CAUSES:
            if kind in self._lines and (kind != "refused" or _refuses(phase, status)):
                line = self._lines[kind]
                if kind == "oom":
                    return _out_of_memory(phase, line)
                return msgspec.convert({"kind": kind, "phase": phase, "line": line}, Failure)
        if status == -9:
            return _out_of_memory(phase, "killed (SIGKILL), as by a host that is out of memory")
        if status == -11:
            return Failure("illegal_address", phase, "ended by SIGSEGV")
        ended = f"ended with status {status}" if status is not None else ""
        return Failure("crash", phase, "; ".join(part for part in (ended, self._last) if part))

    @property
    def seen(self) -> bool:
        """Whether a line named a cause."""
        return any(kind != "refused" for kind in self._lines)


def _out_of_memory(phase: Phase, line: str) -> Failure:
    return Failure("startup_oom" if phase == "start" else "runtime_oom", phase, line)


def _refuses(phase: Phase, status: int | None) -> bool:
    """A running server that warns of an argument has not failed for it."""
    return phase == "start" and (status is None or status > 0)
