"""Whether a report is what it says: its hashes, and whether its figures follow from its parts.

Nothing is measured. Every check returns findings, a line for each; a report without any is whole.
A file that was changed and sealed anew passes the checks of hashes, but not those of figures: a
total must be the sum of its requests, an accuracy that of its graded answers, a ratio that of its
rounds. What no check can see is whether the machine was the one that is named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from millrace.errors import UserError
from millrace.report.steps.document import FORMAT, VERSION, Report, hash_matches
from millrace.report.steps.hashes import digest, hash_of, model_files, package_files, plain
from millrace.report.summary import bench_runs, summary_of
from millrace.tasks import TASKS

_CLOSE = 1e-6  # relative


def read_report(path: Path) -> Report:
    """A report's file. Raises UserError for one that cannot be read, or is of another version."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the report.json of a report") from None
    try:
        head = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UserError(f"{path}: no JSON object ({error}); give a report.json") from None
    if head.get("format") != FORMAT:
        raise UserError(f"{path}: not written by `millrace report`; give a report.json")
    if head.get("version") != VERSION:
        raise UserError(f"{path}: its version is {head.get('version')}; this reads {VERSION}")
    try:
        return msgspec.json.decode(data, type=Report)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: it is not of the form of a report ({error})") from None


def findings(report: Report, *, model: Path | None = None, page: str | None = None) -> list[str]:
    """What is wrong with a report. model: a directory to compare with; page: its HTML file."""
    found = [*_hashes(report), *_runs(report), *_accuracy(report), *_summary(report)]
    if model is not None:
        found += _model(report, model)
    if page is not None and report.sha256 not in page:
        found.append("the HTML file is not of this report: it has another hash")
    return found


def remarks(report: Report) -> list[str]:
    """What is worth knowing, and no fault."""
    same = package_files().sha256 == report.package.sha256
    found = [
        f"made {report.made} with profile {report.profile.get('name')}",
        f"the package is {'the one installed here' if same else 'another than the one here'}",
    ]
    missing = [r.name for r in report.steps if r.status != "done"]
    return [*found, *(f"{name} was not done" for name in missing)]


# --- hashes --------------------------------------------------------------------------------------


def _hashes(report: Report) -> Iterator[str]:
    if not hash_matches(report):
        yield "the report's hash is not that of its content: it was changed after it was written"
    names = [record.name for record in report.steps]
    yield from (f"step {name} is there twice" for name in set(names) if names.count(name) > 1)
    for record in report.steps:
        if not hash_matches(record):
            yield f"step {record.name}: its hash is not that of its content"
        if (record.status == "done") != (record.result is not None):
            yield f"step {record.name}: it is {record.status}, and its result says otherwise"
    for name, hashed in (("model", report.model.files), ("package", report.package)):
        if hash_of(hashed.files) != hashed.sha256:
            yield f"the {name}'s hash does not follow from those of its files"
    own = report.installed
    if digest([own.packages, own.locks]) != own.sha256:
        yield "the hash of the installed versions does not follow from them"


def _model(report: Report, directory: Path) -> Iterator[str]:
    there = {one.name: one for one in model_files(directory).files}
    said = {one.name: one for one in report.model.files.files}
    for name in sorted(there.keys() | said.keys()):
        if name not in there:
            yield f"model file {name} is in the report and not in {directory}"
        elif name not in said:
            yield f"model file {name} is in {directory} and not in the report"
        elif there[name] != said[name]:
            yield f"model file {name} is another than the one that was measured"


# --- figures -------------------------------------------------------------------------------------


def _runs(report: Report) -> Iterator[str]:
    """Of every run of the load generator: totals, rates and medians against its requests."""
    for name, run in bench_runs(report.steps):
        try:
            wrong = [
                f"{figure} is {said!r}, and its requests give {true!r}"
                for figure, said, true in _figures(run)
                if not _same(said, true)
            ]
        except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
            yield f"{name}: its figures cannot be worked out ({type(error).__name__}: {error})"
            continue
        yield from (f"{name}: {line}" for line in wrong)


def _figures(run: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, as it is said, as it follows)."""
    good = [at for at, error in enumerate(run["errors"]) if not error]
    inputs = sum(run["input_lens"][at] for at in good)
    outputs = sum(run["output_lens"][at] for at in good)
    seconds = run["duration"]
    yield "completed", run["completed"], len(good)
    yield "failed", run["failed"], len(run["errors"]) - len(good)
    yield "total_input_tokens", run["total_input_tokens"], inputs
    yield "total_output_tokens", run["total_output_tokens"], outputs
    yield "request_throughput", run["request_throughput"], len(good) / seconds
    yield "output_throughput", run["output_throughput"], outputs / seconds
    yield "total_token_throughput", run["total_token_throughput"], (inputs + outputs) / seconds
    ttft = 1e3 * statistics.median(run["ttfts"][at] for at in good) if good else 0.0
    yield "median_ttft_ms", run["median_ttft_ms"], ttft
    yield from _server_figures(run.get("server") or {}, inputs, outputs)


def _server_figures(
    server: Mapping[str, Any], inputs: int, outputs: int
) -> Iterator[tuple[str, Any, Any]]:
    energy, spec = server.get("energy_j"), server.get("speculation")
    if energy is not None and outputs:
        yield "joules_per_token", server["joules_per_token"], energy / (inputs + outputs)
        yield "joules_per_output_token", server["joules_per_output_token"], energy / outputs
    counters = server.get("counters") or {}
    if spec is not None:
        drafts = counters["spec_decode_num_drafts"]
        accepted = counters.get("spec_decode_num_accepted_tokens")
        if accepted is not None and drafts:
            yield "acceptance_length", spec["acceptance_length"], 1 + accepted / drafts
            yield (
                "acceptance_by_position",
                sum(spec["acceptance_by_position"]),
                accepted / drafts,
            )


def _same(said: Any, true: Any) -> bool:
    return math.isclose(float(said), float(true), rel_tol=_CLOSE, abs_tol=1e-9)


def _accuracy(report: Report) -> Iterator[str]:
    """Our own tasks: every answer is graded again, and the counts are those of the answers."""
    for record in report.steps:
        result = record.result
        if record.section != "accuracy" or not isinstance(result, dict) or "items" not in result:
            continue
        try:
            yield from (f"{record.name}: {line}" for line in _graded(record.name, result))
        except (LookupError, TypeError, ValueError) as error:
            yield f"{record.name}: its answers cannot be graded ({type(error).__name__}: {error})"


def _graded(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    task, items = TASKS[name.split("/")[1]], result["items"]
    right = 0
    for answer in items:
        index = int(answer["id"].rpartition("/")[2])
        item = task.make(index, result["seed"], "heldout")
        grade = task.grade(item, answer["text"])
        right += grade.correct
        if grade.correct != answer["correct"]:
            yield f"answer {answer['id']} is {'right' if grade.correct else 'wrong'} by its text"
    said = result["summary"]["items"]
    if (said["right"], said["total"]) != (right, len(items)):
        yield f"{said['right']} of {said['total']} answers are right, it says, but {right} are"


def _summary(report: Report) -> Iterator[str]:
    """The summary is worked out again."""
    try:
        again = plain(summary_of(report.steps))
    except (LookupError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        yield f"the summary cannot be worked out from the steps ({type(error).__name__}: {error})"
        return
    for name in sorted(again.keys() | report.summary.keys()):
        if again.get(name) != report.summary.get(name):
            yield f"summary, {name}: it does not follow from the steps"
