"""Failures told apart by what servers write."""

from __future__ import annotations

import pytest

from millrace.tune.trials.failures import LogReader, Phase

OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
WALL = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_util"
LEN = (
    "ValueError: To serve at least one request with the model's max seq len (131072), 8.1 GiB KV "
    "cache is needed"
)
LESS = "ValueError: Free memory on device (70/79 GiB) is less than desired GPU memory utilization"
ILLEGAL = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
FLAG = "vllm: error: unrecognized arguments: --kv-cache-dtyp fp8"
OURS = "millrace serve: --max-num-seqs 0: use 1 or more"


@pytest.mark.parametrize(
    ("lines", "phase", "status", "kind"),
    [
        ([OOM, "RuntimeError: Engine core initialization failed"], "start", 1, "startup_oom"),
        ([OOM, "the engine died"], "run", 1, "runtime_oom"),
        ([LESS], "start", 1, "startup_oom"),
        ([WALL], "start", 1, "no_room"),
        ([LEN], "start", 1, "no_room"),
        (["warming up", ILLEGAL, "Engine core died"], "run", 1, "illegal_address"),
        ([ILLEGAL, OOM], "run", 1, "illegal_address"),
        ([FLAG], "start", 2, "refused"),
        ([OURS], "start", 2, "refused"),
        (["millrace serve: a warning", "Traceback"], "run", 1, "crash"),
        (["KeyError: 'x'"], "start", 1, "crash"),
        ([], "run", -11, "illegal_address"),
        ([], "run", -9, "runtime_oom"),
        ([], "start", -9, "startup_oom"),
    ],
)
def test_the_cause_of_a_failure(lines: list[str], phase: Phase, status: int, kind: str) -> None:
    reader = LogReader()
    for line in lines:
        reader.feed(f"(EngineCore pid=7) {line}" if line not in (OURS, lines[0]) else line)
    found = reader.failure(phase, status)
    assert found.kind == kind
    assert found.phase == phase


def test_the_line_of_the_log_is_kept() -> None:
    reader = LogReader()
    for line in ("loading", OOM, "torch.OutOfMemoryError: again", "bye"):
        reader.feed(line)
    assert reader.failure("start", 1).line == OOM
    assert "status 3; ends here" in str(lastly("ends here").failure("run", 3))


def lastly(line: str) -> LogReader:
    reader = LogReader()
    reader.feed(line)
    return reader
