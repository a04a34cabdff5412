"""The form of a report: what its JSON file holds. `version` counts changes that readers notice.

A step is the smallest part that is measured at once and kept; `sha256` of a step covers all of its
other fields, that of a report all of the report's.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from millrace.report.steps.hashes import Hashed, Installed, digest

FORMAT = "millrace-report"
VERSION = 1

Status = Literal["done", "absent", "failed"]


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did. server: the command of the server that it measured, empty without one.
    command: what anybody would run to do the same. reason: why there is no result. began: UTC.
    load_average: of the host as the step began."""

    name: str
    section: str
    status: Status
    server: list[str] = []
    command: list[str] = []
    reason: str = ""
    result: Any = None
    began: str = ""
    seconds: float = 0.0
    load_average: float = 0.0
    sha256: str = ""


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The model: how it was named, and its files."""

    name: str
    files: Hashed


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A report. profile: the sizes of all workloads, under `name`. summary: figures that follow
    from the steps, and that `verify` works out again."""

    format: str = FORMAT
    version: int = VERSION
    made: str
    millrace: str
    commit: str
    profile: dict[str, Any]
    serve_arguments: list[str]
    model: ModelRecord
    package: Hashed
    installed: Installed
    steps: list[StepRecord]
    summary: dict[str, Any]
    sha256: str = ""


def sealed_step(record: StepRecord) -> StepRecord:
    """A step with its hash."""
    return msgspec.structs.replace(record, sha256=digest(_without_hash(record)))


def sealed(report: Report) -> Report:
    """A report with its hash."""
    return msgspec.structs.replace(report, sha256=digest(_without_hash(report)))


def hash_matches(one: StepRecord | Report) -> bool:
    """Whether the hash in a step or a report is that of its content."""
    return one.sha256 == digest(_without_hash(one))


def _without_hash(one: StepRecord | Report) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__struct_fields__ if name != "sha256"}
