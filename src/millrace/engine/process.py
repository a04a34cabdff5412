"""One replica put together: scheduler, worker and ranks; and the process that serves a front.

The only module of this package that reaches down to the runtime, and so to torch; it does so when
an engine is built, not on import. As a program it speaks msgpack over two ZMQ sockets in a
directory that the front made, and ends when the front does.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from millrace.config import EngineArgs, EngineConfig, ModelFacts, resolve
from millrace.engine.engine import Engine
from millrace.engine.grammar import Grammars
from millrace.engine.scheduler import Scheduler
from millrace.errors import RequestError, UserError
from millrace.models import find_model
from millrace.protocol import (
    Abort,
    AddRequest,
    Delta,
    Failed,
    FromEngine,
    Outputs,
    Ready,
    SamplingParams,
    Shutdown,
    ToEngine,
)

if TYPE_CHECKING:
    from millrace.model.config import ModelConfig
    from millrace.runtime.ranks import Ranks
    from millrace.runtime.worker import Worker

log = logging.getLogger("millrace.engine")

IDLE_POLL_MS = 500
RANK_STOP_LIMIT = 10.0
PR_SET_PDEATHSIG = 1  # Linux, prctl(2)

_encode_args = msgspec.json.Encoder().encode
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToEngine).decode


def _wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait, unless told otherwise; before torch is loaded.

    Threads that spin take the cores from the threads they wait for, and from the front: with more
    threads than free cores a step takes ten times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# --- putting an engine together ----------------------------------------------------------------


def build_engine(args: EngineArgs) -> Engine:
    """Load the model, size the memory, complete a real step. Raises UserError, or what failed.

    With tensor_parallel_size > 1 the other ranks are started here, unless torchrun has done so.
    """
    _wait_passively()
    from millrace.runtime import ranks

    config, model = _resolve(args)
    if ranks.launched_by_torchrun():
        rank, size = ranks.place(args.tensor_parallel_size)
        return _assemble(config, model, ranks.Ranks.join(rank, size, _backend(config)), [])
    size = args.tensor_parallel_size
    if size == 1:
        return _assemble(config, model, ranks.Ranks(), [])
    children = _start_ranks(args, size, ranks.free_port())
    try:
        return _assemble(config, model, ranks.Ranks.join(0, size, _backend(config)), children)
    except BaseException:
        _stop_ranks(children, limit=0.0)
        raise


def run_rank(args: EngineArgs) -> int:
    """Be a rank other than 0 (RANK and WORLD_SIZE are set) until rank 0 says stop. Exit status."""
    _wait_passively()
    from millrace.runtime import ranks

    rank, size = ranks.place(args.tensor_parallel_size)
    config, model = _resolve(args)
    try:
        worker = _worker(config, model, ranks.Ranks.join(rank, size, _backend(config)))
    except UserError as error:
        log.error("rank %d: %s", rank, error)
        return 2
    worker.follow()
    worker.ranks.leave()
    return 0


def _resolve(args: EngineArgs) -> tuple[EngineConfig, ModelConfig]:
    import torch

    from millrace.model.config import read_config

    model = read_config(find_model(args.model))
    facts = ModelFacts(
        max_position_embeddings=model.max_positions,
        checkpoint_dtype=model.dtype,
        mtp_layers=model.mtp_layers,
    )
    return resolve(args, facts, cuda=torch.cuda.is_available()), model


def _worker(config: EngineConfig, model: ModelConfig, ranks: Ranks) -> Worker:
    from millrace.runtime.worker import Worker

    return Worker(config, model, find_model(config.args.model), ranks)


def _backend(config: EngineConfig) -> str:
    return "nccl" if config.device == "cuda" else "gloo"


class _Replica(Engine):
    """An engine that also ends the ranks it started."""

    children: list[subprocess.Popen[bytes]]

    def close(self) -> None:
        super().close()
        _stop_ranks(self.children, RANK_STOP_LIMIT)


def _assemble(
    config: EngineConfig,
    model: ModelConfig,
    ranks: Ranks,
    children: list[subprocess.Popen[bytes]],
) -> Engine:
    worker = _worker(config, model, ranks)
    depth = 1 if config.async_scheduling else 0
    _warm_up(Engine(Scheduler(worker.limits()), worker, depth=depth))
    engine = _Replica(
        Scheduler(worker.limits()),
        worker,
        depth=depth,
        plan_log=Path(config.args.plan_log) if config.args.plan_log else None,
        check=config.args.debug,
        config=config,
        grammars=_grammars(config, model),
    )
    engine.children = children
    gc.collect()
    gc.freeze()
    return engine


def _grammars(config: EngineConfig, model: ModelConfig) -> Grammars:
    tokenizer = find_model(config.args.tokenizer or config.args.model) / "tokenizer.json"
    return Grammars(tokenizer, model.vocab_size, model.eos_ids, config.drafts + 1)


def _warm_up(engine: Engine) -> None:
    """Serve one request, so that what is said to be ready has run."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.add(AddRequest(id="warm-up", prompt=[0], params=params))
    while engine.has_work():
        engine.step()


# --- ranks on this host ------------------------------------------------------------------------


def _start_ranks(args: EngineArgs, size: int, port: int) -> list[subprocess.Popen[bytes]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, "-m", "millrace.engine.process", "--args", _args_json(args)]
    return [
        subprocess.Popen(
            [*command, "--parent-pid", str(os.getpid())],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size)},
        )
        for rank in range(1, size)
    ]


def _stop_ranks(children: list[subprocess.Popen[bytes]], limit: float) -> None:
    """Wait for ranks that were told to stop; end those that do not within `limit` seconds."""
    deadline = time.monotonic() + limit
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# --- serving a front ---------------------------------------------------------------------------


class _Front:
    """The engine's end of the two sockets."""

    def __init__(self, directory: Path) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._incoming = context.socket(zmq.PULL)
        self._incoming.connect(f"ipc://{directory}/to-engine")
        self._outgoing = context.socket(zmq.PUSH)
        self._outgoing.setsockopt(zmq.SNDHWM, 0)  # the front bounds how much can be under way
        self._outgoing.connect(f"ipc://{directory}/from-engine")

    def send(self, message: FromEngine) -> None:
        self._outgoing.send(_encode(message))

    def receive(self, wait_ms: int) -> list[ToEngine]:
        """All messages that are there, waiting up to `wait_ms` for the first."""
        messages: list[ToEngine] = []
        if wait_ms and not self._incoming.poll(wait_ms):
            return messages
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(_decode(self._incoming.recv(zmq.NOBLOCK)))
        return messages

    def close(self) -> None:
        self._incoming.close(linger=0)
        self._outgoing.close(linger=1000)


def serve(args: EngineArgs, directory: Path, parent: int) -> int:
    """Build an engine and run it for the front behind `directory`. Returns the exit status."""
    front = _Front(directory)
    try:
        engine = build_engine(args)
        front.send(_ready(engine))
        _run(engine, front, parent)
        engine.close()
        return 0
    except UserError as error:
        front.send(Failed(str(error), user_error=True))
        return 2
    except Exception as error:
        log.exception("the engine failed")
        front.send(Failed(f"{type(error).__name__}: {error}", user_error=False))
        return 1
    finally:
        front.close()


def _run(engine: Engine, front: _Front, parent: int) -> None:
    """Serve until told to stop, or until the front is gone."""
    while True:
        busy = engine.has_work()
        messages = front.receive(0 if busy else IDLE_POLL_MS)
        refused: list[Delta] = []
        for message in messages:
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Abort):
                engine.abort(message.ids)
            else:
                refused += _add(engine, message)
        deltas = refused + (engine.step() if engine.has_work() else [])
        if deltas or messages:
            front.send(Outputs(deltas, engine.stats()))
        if os.getppid() != parent:
            return


def _add(engine: Engine, request: AddRequest) -> list[Delta]:
    try:
        engine.add(request)
    except RequestError as error:
        return [Delta(request.id, [], "error", error=str(error))]
    return []


def _ready(engine: Engine) -> Ready:
    limits = engine.scheduler.limits
    return Ready(
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        summary=summary(engine),
    )


def summary(engine: Engine) -> str:
    """The settled configuration in one line a topic, for the log."""
    config, limits = engine.config, engine.scheduler.limits
    assert config is not None
    return "\n".join(
        [
            f"model {config.args.model}: {config.dtype} on {config.device}, "
            f"tensor_parallel_size {config.args.tensor_parallel_size}",
            f"max_model_len {limits.max_model_len}, max_num_seqs {limits.max_num_seqs}, "
            f"max_num_batched_tokens {limits.max_num_batched_tokens}",
            f"KV {config.kv_dtype}: {limits.num_pages - 1} pages of {limits.page_size} tokens; "
            f"state {config.state_dtype}, window {config.window}; "
            f"{limits.num_snapshots} snapshots for the prefix cache",
            f"MTP: {limits.drafts} draft tokens; pipeline depth {int(config.async_scheduling)}",
        ]
    )


def _args_json(args: EngineArgs) -> str:
    return _encode_args(args).decode()


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process as soon as the one that started it is gone.

    On Linux, and at once whatever runs; elsewhere only the loop's own check notices.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before it was watched
        sys.exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="millrace.engine.process")
    parser.add_argument("--args", required=True, help="EngineArgs as JSON")
    parser.add_argument("--socket-dir", type=Path, help="where the front's sockets are")
    parser.add_argument("--parent-pid", type=int, default=os.getppid())
    options = parser.parse_args()
    end_with_parent(options.parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides when to stop
    args = msgspec.json.decode(options.args, type=EngineArgs)
    if options.socket_dir is None:
        return run_rank(args)
    return serve(args, options.socket_dir, options.parent_pid)


if __name__ == "__main__":
    sys.exit(main())
