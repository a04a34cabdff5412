"""`millrace tune kernels` as a user meets it where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from millrace.tune.kernels import PROGRAM, KernelFlags, measure


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    command = [sys.executable, "-m", "millrace", "tune", "kernels", "millrace-mini-fp8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "millrace tune kernels: there is no GPU here; run it on the machine that will serve\n"
    )


def test_flags_reach_the_program_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    flags = KernelFlags(sections=["fp8_tiles", "w4_products"], tokens=[64, 16], out="table.json")
    assert measure("some/model", flags) == 3
    from millrace.runtime.kernel_tuning.__main__ import _options

    (command,) = seen
    assert command[1:3] == ["-m", PROGRAM]
    options = _options(command[3:])
    assert (options.model, options.ranks, options.drafts) == ("some/model", 1, 1)
    assert (options.cached, options.page, options.by) == (1, 64, "time")
    assert (options.tokens, options.sections) == ((16, 64), ["fp8_tiles", "w4_products"])
    assert str(options.out) == "table.json"
