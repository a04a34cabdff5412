"""A server that runs elsewhere: a command of the user restarts it with the flags of each visit."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from millrace import cli
from millrace.common.sockets import free_port

MOCK = Path(__file__).parents[2] / "support" / "mock_replica.py"
SPACE = """
engine: mock
knobs:
  gap:
    flag: --gap
    values: [0.02, 0.0]
    default: 0.0
  fail:
    words: ["", "--fail 'CUDA out of memory'"]
    values: [false, true]
    default: false
    riskier: {memory: up}
"""
RESTART = """
[ -f pid ] && kill -9 $(cat pid)
{python} {mock} --host 127.0.0.1 --port {port} "$@" >> server.log 2>&1 &
echo $! > pid
"""
LOAD = (
    *("--max-concurrency", "2", "--num-prompts", "4", "--random-input-len", "8"),
    *("--random-output-len", "5", "--num-warmups", "0", "--short-share", "1"),
    *("--accuracy-items", "0", "--least-rounds", "1", "--most-rounds", "1", "--full-runs", "1"),
)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A directory with a command that restarts a server, and its port; it is ended afterwards."""
    port = free_port("127.0.0.1")
    names = {"python": shlex.quote(sys.executable), "mock": shlex.quote(str(MOCK)), "port": port}
    (tmp_path / "restart.sh").write_text(RESTART.format(**names))
    (tmp_path / "space.yaml").write_text(SPACE)
    yield tmp_path, port
    if (tmp_path / "pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_server_is_restarted_with_the_flags_of_each_trial(
    running: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, port = running
    study = directory / "study"
    command = ["tune", "any", "--engine", "mock", "--space", str(directory / "space.yaml")]
    command += ["--base-url", f"http://127.0.0.1:{port}", "--gpus", "1", "--dir", str(study)]
    command += ["--restart-command", f"cd {shlex.quote(str(directory))} && sh restart.sh {{flags}}"]
    command += ["--log-file", str(directory / "server.log"), "--start-timeout", "60"]
    assert cli.run([*command, *LOAD, "--trials", "3"]) == 0
    capsys.readouterr()
    assert cli.run(["tune", "show", str(study), "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out)
    trials = {row["label"]: row for row in found["trials"]}
    assert 0 < trials["gap 0.02"]["value"] < trials["defaults"]["value"]
    (failed,) = (row for label, row in trials.items() if "fail on" in label)
    assert failed["failure"]["kind"] == "startup_oom"  # told by the log, though it runs elsewhere
    assert "CUDA out of memory" in failed["failure"]["line"]
    assert found["verdict"]["best"] == 0
