"""Logs that cannot be written: nothing raises, nothing blocks, losses are counted and reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millrace.common.safe_log import LineWriter, dropped_lines

LINE = b"a line\n"


def test_lines_arrive_in_order(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        writer = LineWriter(file.fileno())
        for number in range(1000):
            writer.write(b"%d\n" % number)
        assert writer.flush()
    assert (tmp_path / "log").read_bytes().split() == [b"%d" % n for n in range(1000)]
    assert writer.dropped == 0


def test_a_full_disk_costs_lines_and_says_why_once() -> None:
    reasons: list[str] = []
    before = dropped_lines()
    with Path("/dev/full").open("wb", buffering=0) as full:
        writer = LineWriter(full.fileno(), on_failure=reasons.append)
        for _ in range(3):
            writer.write(LINE * 2)
            assert writer.flush()
    assert (writer.dropped, dropped_lines() - before) == (6, 6)
    assert reasons == ["No space left on device"]


def test_losses_are_reported_when_the_output_works_again(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(full)
    writer.write(LINE * 5)
    assert writer.flush()
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, full)  # the disk has space again
    writer.write(LINE)
    writer.write(LINE)
    assert writer.flush()
    expected = b"5 log lines were lost (No space left on device)\n" + LINE * 2
    assert (tmp_path / "log").read_bytes() == expected
    os.close(full)
    os.close(file)


def test_a_reader_that_stalls_blocks_nobody_and_the_queue_is_bounded() -> None:
    reading, writing = os.pipe()
    writer = LineWriter(writing, max_queued=10_000)
    began = time.monotonic()
    for _ in range(200_000):
        writer.write(LINE)
    assert time.monotonic() - began < 5.0
    assert writer.dropped > 100_000
    seen = b""
    while seen.count(LINE) < 200_000 - writer.dropped:
        seen += os.read(reading, 1 << 16)
    writer.write(b"after\n")
    while not seen.endswith(b"after\n"):
        seen += os.read(reading, 1 << 16)
    reported = re.findall(rb"(\d+) log lines were lost \(the output takes no more bytes\)\n", seen)
    assert sum(map(int, reported)) == writer.dropped
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("how", ["no reader", "closed descriptor"])
def test_an_output_that_is_gone_raises_nothing(how: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    if how == "closed descriptor":
        os.close(writing)
    writer = LineWriter(writing)
    writer.write(LINE)
    assert writer.flush()
    assert writer.dropped == 1
    if how == "no reader":
        os.close(writing)


PROGRAM = """
import logging, os, socket, sys
from millrace.common.safe_log import dropped_lines, open_standard_descriptors, \
    protect_standard_streams
open_standard_descriptors()
held = socket.socket()
assert held.fileno() > 2, held.fileno()
protect_standard_streams()
logging.basicConfig(level=logging.INFO)
for _ in range(5000):
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    logging.info("by logging")
with open(sys.argv[1], "w") as done:
    done.write(f"done {dropped_lines() > 0}")
"""


@pytest.mark.parametrize(
    ("redirections", "loses"),
    [
        (">/dev/full 2>&1", True),
        (">&- 2>&- <&-", False),
        ("2>&1 | head -1 >/dev/null", True),
        ("2>&1 | sleep 20", False),  # what does not fit into the pipe fits into the queue
        (">/dev/null 2>&1", False),
    ],
)
def test_a_process_goes_on_whatever_its_streams_are(
    redirections: str, loses: bool, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    command = f'"{sys.executable}" -c "$PROGRAM" "{done}" {redirections}'
    process = subprocess.Popen(
        ["bash", "-c", command],
        env={**os.environ, "PROGRAM": PROGRAM},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 15
        while not done.exists() or not done.read_text():
            assert time.monotonic() < end, "it stands still"
            time.sleep(0.05)
        assert done.read_text() == f"done {loses}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_everything_printed_arrives_at_the_end_of_the_process() -> None:
    program = (
        "import sys\n"
        "from millrace.common.safe_log import protect_standard_streams\n"
        "protect_standard_streams()\n"
        "print('out'); sys.stdout.write('half'); sys.stderr.buffer.write(b'bytes\\n')\n"
        "raise ValueError('at the end')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "out\nhalf"
    assert done.stderr.startswith("bytes\nTraceback")
    assert done.stderr.endswith("ValueError: at the end\n")


def test_a_forked_child_logs_for_itself(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as file:
        writer = LineWriter(file.fileno())
        writer.write(b"parent\n")
        assert writer.flush()
        child = os.fork()
        if child == 0:
            writer.write(b"child\n")
            os._exit(0 if writer.flush() else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "log").read_bytes() == b"parent\nchild\n"
