"""Two real ranks over Gloo. What goes wrong with one of them is named, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from millrace.config import engine_args
from millrace.errors import ConfigError, RankError
from millrace.model.tiny import UNIT_TEST, write_checkpoint
from millrace.protocol import AddRequest, Failed, FromEngine, Ready, SamplingParams
from millrace.replica import rank_launcher
from millrace.replica.build import Replica
from millrace.runtime.ranks import allreduce, heartbeat
from millrace.runtime.ranks.allreduce_algorithms import GatherAllReduce
from millrace.runtime.ranks.ranks import Ranks
from tests.support.engines import DEFAULTS, assert_same, build, generate, run

LIMIT = 30.0  # seconds in which everything must be over; it takes about two


@pytest.fixture
def pair(tiny_model: Path) -> Iterator[Replica]:
    """A replica of two ranks with work under way."""
    engine = build(tiny_model, tensor_parallel_size=2)
    assert isinstance(engine, Replica)
    begin(engine)
    try:
        yield engine
    finally:
        engine.close()
        assert not any(map(psutil.pid_exists, engine.children.pids))


def begin(engine: Replica) -> None:
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    engine.add(AddRequest(id="long", prompt=[5, 6, 7], params=params))
    for _ in range(5):
        engine.step()


def failure(engine: Replica) -> str:
    """The error with which a running engine stops, in time."""

    def go_on() -> None:
        began = time.monotonic()
        while time.monotonic() - began < LIMIT:
            engine.check()
            engine.step()

    with pytest.raises(RankError) as error:
        go_on()
    with pytest.raises(RankError):
        engine.check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_killed_rank_is_named(pair: Replica) -> None:
    (pid,) = pair.children.pids
    os.kill(pid, signal.SIGKILL)
    assert failure(pair) == f"rank 1 (pid {pid}) died with signal 9"


def test_a_stopped_rank_is_named(pair: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "STOPPED_LIMIT", 1.0)
    (pid,) = pair.children.pids
    os.kill(pid, signal.SIGSTOP)
    line = failure(pair)
    assert line.startswith(f"rank 1 (pid {pid}) has not answered for ")
    assert line.endswith("and is stopped")


def test_another_plan_is_refused(pair: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is given other bytes than those that rank 0 runs."""
    ranks = pair.ranks
    send, spoiled = type(ranks).broadcast_bytes, []

    def spoil(self: object, data: object) -> None:
        if self is ranks and not spoiled:
            spoiled.append(1)
            data = data.clone()  # type: ignore[attr-defined]
            data[40] ^= 1  # type: ignore[index]
        send(self, data)  # type: ignore[arg-type]

    monkeypatch.setattr(type(ranks), "broadcast_bytes", spoil)
    (pid,) = pair.children.pids
    line = failure(pair)
    assert line.startswith(f"rank 1 (pid {pid}) has another plan: step ")
    assert "with digest" in line


def test_an_all_reduce_algorithm_that_hangs_ends_the_start(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it can be left out."""

    def hang(self: GatherAllReduce, x: object) -> object:
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            self.ranks.check()
            time.sleep(0.01)
        raise AssertionError("nobody ended it")

    monkeypatch.setattr(allreduce, "TRIAL_LIMIT", 6.0)
    monkeypatch.setattr(GatherAllReduce, "__call__", hang)
    with pytest.raises(RankError) as error:
        build(tiny_model, tensor_parallel_size=2)
    line = str(error.value)
    assert line.startswith(
        f"rank 0 (pid {os.getpid()}) has been trying all-reduce by gloo one-shot"
    )
    assert line.endswith("; MILLRACE_SKIP_ALL_REDUCE='gloo one-shot' leaves that algorithm out")
    monkeypatch.setattr(allreduce, "TRIAL_LIMIT", LIMIT)
    monkeypatch.setenv("MILLRACE_SKIP_ALL_REDUCE", "gloo one-shot")
    engine = build(tiny_model, tensor_parallel_size=2)
    assert isinstance(engine, Replica)
    assert {timing.algorithm for timing in engine.worker.all_reduce.timings} == {"gloo"}
    engine.close()


def test_a_rank_that_cannot_start_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RankError, match=r"^rank 1 ended with status 1 before it had joined$"):
        build(tiny_model, tensor_parallel_size=2)


def test_other_options_are_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = rank_launcher.LocalRanks.start.__func__  # type: ignore[attr-defined]

    def with_other_seed(cls: object, args: object, *rest: object) -> object:
        return start(cls, msgspec.structs.replace(args, seed=7), *rest)  # type: ignore[type-var]

    monkeypatch.setattr(rank_launcher.LocalRanks, "start", classmethod(with_other_seed))
    with pytest.raises(ConfigError, match=r"rank 1 \(pid \d+\) has another seed: 7, where rank 0"):
        build(tiny_model, tensor_parallel_size=2)


def test_the_engine_process_reports_it(tiny_model: Path) -> None:
    """As a server's engine, idle: one message with the line, exit status 1, no process left."""
    args = engine_args(model=str(tiny_model), tensor_parallel_size=2, **DEFAULTS)
    with tempfile.TemporaryDirectory() as directory, zmq.Context() as context:
        incoming = context.socket(zmq.PULL)
        incoming.bind(f"ipc://{directory}/from-engine")
        command = [sys.executable, "-m", "millrace.replica.process", "--socket-dir", directory]
        command += ["--args", msgspec.json.encode(args).decode()]
        command += ["--parent-pid", str(os.getpid())]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as engine:
            wait_for(incoming, Ready)
            (rank,) = psutil.Process(engine.pid).children()
            rank.suspend()
            failed = wait_for(incoming, Failed)
            assert isinstance(failed, Failed)
            assert failed.message.startswith(f"rank 1 (pid {rank.pid}) has not answered for 5 s")
            _, log = engine.communicate(timeout=LIMIT)
        incoming.close(linger=0)
    assert engine.returncode == 1
    assert not rank.is_running()
    assert log.count("has not answered") == 1
    assert "Traceback" not in log


def test_the_tokens_of_one_rank_from_fp8_weights_of_awkward_width(tmp_path: Path) -> None:
    """With drafts and the prefix cache; blocks and tiles do not divide by two."""
    shape = replace(UNIT_TEST, fp8=True, intermediate_size=136, vocab_size=321)
    model = write_checkpoint(tmp_path / "model", shape, seed=2)
    spec = {"speculative_config": {"num_speculative_tokens": 2}, "enable_prefix_caching": True}
    prompts = [[5, 9, 40, 77] * 6, [5, 9, 40, 77] * 6 + [8, 3], [11]]
    alone, _ = run(model, prompts)
    engine = build(model, tensor_parallel_size=2, **spec)
    try:
        for _ in range(2):
            assert_same(model, prompts, alone, generate(engine, prompts))
        assert engine.stats().prefix_hits > 0
    finally:
        engine.close()


DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.0, "seed": 6, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "seed": 7, "presence_penalty": 0.5},
]


@pytest.mark.parametrize(
    "k", [0, 3, *(pytest.param(few, marks=pytest.mark.sweep) for few in (1, 2))]
)
def test_ranks_draw_the_tokens_of_one(
    odd_model: Path, alone: list[list[list[int]]], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a rank sees the whole vocabulary only where a request needs it."""
    all_gather, gathered = Ranks.all_gather, []
    monkeypatch.setattr(
        Ranks, "all_gather", lambda *given: gathered.append(1) or all_gather(*given)
    )
    spec = {"num_speculative_tokens": k} if k else None
    engine = build(odd_model, tensor_parallel_size=2, speculative_config=spec)
    try:
        for draws, tokens in zip(DRAWS, alone, strict=True):
            gathered.clear()
            assert generate(engine, ODD_PROMPTS, 16, **draws) == tokens
            assert bool(gathered) == (draws is not DRAWS[0] and draws is not DRAWS[1])
    finally:
        engine.close()


ODD_PROMPTS = [[5, 9, 40, 77] * 6, [11], [8, 3, 300]]


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vocabulary does not divide into tiles for two ranks."""
    shape = replace(UNIT_TEST, vocab_size=321)
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "model", shape, seed=4)


@pytest.fixture(scope="module")
def alone(odd_model: Path) -> list[list[list[int]]]:
    engine = build(odd_model)
    out = [generate(engine, ODD_PROMPTS, 16, **draws) for draws in DRAWS]
    engine.close()
    return out


def wait_for(socket: zmq.Socket[bytes], kind: type) -> object:
    """The next message of that kind."""
    deadline = time.monotonic() + 2 * LIMIT
    while time.monotonic() < deadline:
        if socket.poll(100):
            message = msgspec.msgpack.decode(socket.recv(), type=FromEngine)
            if isinstance(message, kind):
                return message
    raise AssertionError(f"no {kind.__name__} came")
