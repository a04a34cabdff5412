"""The program of a sandbox process: reads jobs from stdin and writes an answer for each to stdout.

It limits its own memory before it reads the first job. Time is limited by the parent, which kills
it. It ends when its stdin ends, and with its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from millrace.common.child_process import end_with_parent
from millrace.common.optional import available
from millrace.errors import RequestError
from millrace.server.sandbox.jobs import (
    Answer,
    EncodeText,
    Job,
    Ready,
    Refused,
    Source,
    TokenIds,
    answer_framing,
    job_framing,
)
from millrace.text.grammar import grammar_notes
from millrace.text.tokenizer import Tokenizer

READ_BYTES = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    end_with_parent(options.parent_pid)
    jobs, answers = _take_stdio()
    with contextlib.suppress(ValueError, OSError):  # a lower hard limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (options.memory_bytes, options.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    if tokenizer is None and available("llguidance"):
        import llguidance  # noqa: F401  (so that the first job does not wait for it)
    _send(answers, Ready())
    for job in _received(jobs):
        _send(answers, _answer(job, tokenizer))
    return 0


def _received(jobs: int) -> Iterator[Job]:
    buffer = bytearray()
    while part := os.read(jobs, READ_BYTES):
        buffer += part
        yield from job_framing.take(buffer)


def _take_stdio() -> tuple[int, BinaryIO]:
    """The pipes for jobs and answers; what native code prints goes nowhere."""
    jobs, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    return jobs, os.fdopen(answers, "wb")


def _send(answers: BinaryIO, answer: Answer) -> None:
    answers.write(answer_framing.encode(answer))
    answers.flush()


def _answer(job: Job, tokenizer: Tokenizer | None) -> Answer:
    try:
        if isinstance(job, EncodeText):
            assert tokenizer is not None
            return _encoded(job, tokenizer)
        source = job.build()
        return Source(source, list(grammar_notes(source)))
    except RequestError as error:
        return Refused(str(error), error.param, error.code)


def _encoded(job: EncodeText, tokenizer: Tokenizer) -> TokenIds:
    ids = tokenizer.encode(job.text, job.add_special_tokens)
    count = len(ids)
    if count > job.most:
        ids = {"all": [], "first": ids[: job.most], "last": ids[-job.most :]}[job.kept]
    return TokenIds(count, array("I", ids).tobytes())


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
