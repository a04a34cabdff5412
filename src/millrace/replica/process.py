"""The engine process: it serves a server process with one replica, or runs another rank of one.

It speaks msgpack over two ZMQ sockets in a directory that the server process made, and ends when
that process ends.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import msgspec
import zmq

from millrace.common.child_process import end_with_parent
from millrace.common.safe_log import exit_at_once, protect_standard_streams
from millrace.config import EngineArgs, EngineConfig
from millrace.engine.engine import Engine
from millrace.errors import RankError, RequestError, UserError
from millrace.logs.setup import set_up_logs
from millrace.protocol import (
    Abort,
    AddRequest,
    Delta,
    EngineStats,
    Failed,
    FromEngine,
    Limits,
    Outputs,
    Ready,
    ResetPrefixCache,
    SetPaused,
    Shutdown,
    ToEngine,
)
from millrace.replica.build import Replica, build_engine, run_rank
from millrace.replica.watchdog import REPORT, Watchdog

log = logging.getLogger("millrace.engine")

IDLE_POLL_MS = 500
LOADS_EVERY = 5.0  # seconds between counts of tokens by expert, which wait for the device
WORK_EVERY = 1.0  # seconds between counts of FLOPs and bytes
HEARTBEAT = 1.0  # seconds after which an idle engine sends its statistics
STUCK_LIMIT = 5.0  # seconds for the loop to notice by itself that its ranks have failed

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToEngine).decode


# --- serving requests --------------------------------------------------------------------------


class _ServerLink:
    """The engine's side of the two sockets."""

    def __init__(self, directory: Path) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._incoming = context.socket(zmq.PULL)
        self._incoming.connect(f"ipc://{directory}/to-engine")
        self._outgoing = context.socket(zmq.PUSH)
        self._outgoing.setsockopt(zmq.SNDHWM, 0)  # the server process limits the requests in flight
        self._outgoing.connect(f"ipc://{directory}/from-engine")
        self._directory = directory

    def send(self, message: FromEngine) -> None:
        self._outgoing.send(_encode(message))

    def receive(self, wait_ms: int) -> list[ToEngine]:
        """All messages that have arrived; waits up to `wait_ms` for the first."""
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

    def end_without_loop(self, why: str) -> NoReturn:
        """From another thread: send the reason, and end a process that hangs in a collective."""
        log.error("%s", why)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        socket = context.socket(zmq.PUSH)
        socket.connect(f"ipc://{self._directory}/from-engine")
        socket.send(_encode(Failed(why, user_error=False)))
        socket.close(linger=1000)
        time.sleep(1.0)  # until it is sent
        exit_at_once(1)


def serve(args: EngineArgs, directory: Path, parent: int) -> int:
    """Build an engine and serve the server process at `directory`. Returns the exit status."""
    server, engine = _ServerLink(directory), None
    watchdog = Watchdog(args.step_timeout, directory / REPORT)
    try:
        engine = build_engine(args, on_failure=lambda why: _end_if_stuck(server, why))
        server.send(_ready(engine))
        _run(engine, server, parent, watchdog)
        watchdog.close()
        engine.close()
        return 0
    except UserError as error:
        server.send(Failed(str(error), user_error=True))
        return 2
    except RankError as error:
        _end_group(server, engine, str(error))
    except Exception as error:
        log.exception("the engine failed")
        server.send(Failed(f"{type(error).__name__}: {error}", user_error=False))
        return 1
    finally:
        server.close()


def _end_group(server: _ServerLink, engine: Replica | None, why: str) -> NoReturn:
    """Send why the ranks have failed, and end at once: a collective in flight may hang."""
    log.error("%s", why)
    server.send(Failed(why, user_error=False))
    server.close()
    if engine is not None:
        engine.children.stop(limit=0.0)
    zmq.Context.instance().term()  # returns once the messages are sent
    exit_at_once(1)


def _end_if_stuck(server: _ServerLink, why: str) -> None:
    """The ranks have failed: end the process soon, if its loop does not notice by itself."""
    timer = threading.Timer(STUCK_LIMIT, server.end_without_loop, [why])
    timer.daemon = True
    timer.start()


def _run(engine: Replica, server: _ServerLink, parent: int, watchdog: Watchdog) -> None:
    """Serve until a Shutdown message, or until the server process is gone."""
    last_sent = last_loads = last_work = 0.0
    paused = False
    while True:
        now = time.monotonic()
        watchdog.beat(now)
        busy = engine.has_work() and not paused
        messages = server.receive(0 if busy else IDLE_POLL_MS)
        refused: list[Delta] = []
        for message in messages:
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Abort):
                engine.abort(message.ids)
            elif isinstance(message, ResetPrefixCache):
                engine.reset_prefix_cache()
            elif isinstance(message, SetPaused):
                paused = message.paused
            else:
                refused += _add(engine, message)
        engine.check()
        engine.poll()
        deltas = refused + (engine.step() if engine.has_work() and not paused else [])
        if deltas or messages or now - last_sent >= HEARTBEAT:
            stats = engine.stats()
            if now - last_loads >= LOADS_EVERY:
                stats, last_loads = _with_loads(engine, stats), now
            if engine.account is not None and now - last_work >= WORK_EVERY:
                stats = msgspec.structs.replace(stats, work=engine.account.totals())
                last_work = now
            if paused:
                stats = msgspec.structs.replace(stats, paused=True)
            server.send(Outputs(deltas, stats, engine.scheduler.take_moved()))
            last_sent = now
        if os.getppid() != parent:
            return


def _with_loads(engine: Replica, stats: EngineStats) -> EngineStats:
    loads = engine.expert_load()
    if not loads:
        return stats
    ranks = engine.worker.expert_ranks
    return msgspec.structs.replace(stats, expert_tokens=loads, expert_ranks=ranks)


def _add(engine: Engine, request: AddRequest) -> list[Delta]:
    try:
        engine.add(request)
    except RequestError as error:
        return [Delta(request.id, [], "error", error=str(error))]
    return []


def _ready(engine: Replica) -> Ready:
    name, devices = engine.worker.devices()
    limits, address = engine.scheduler.limits, engine.worker.address
    return Ready(
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        summary=summary(engine),
        devices=devices,
        device_name=name,
        engine=address.engine if address else "",
        transfer_host=address.host if address else "",
        transfer_port=address.port if address else 0,
    )


def _conversations(limits: Limits) -> str:
    """What the size of the prefix cache means for conversations."""
    if not limits.prefix_caching:
        return "off, so every turn of a conversation computes its whole prompt"
    if limits.cache_policy == "page":
        return f"up to {limits.num_pages - 1} pages, which running requests take back as needed"
    if not limits.num_snapshots:
        return (
            "no memory for snapshots, so every turn of a conversation computes its whole prompt; "
            "lower --max-num-seqs, or give more memory"
        )
    return (
        f"{limits.num_snapshots} snapshots; a conversation goes on from one, so about so many "
        "conversations are kept between their turns, and of more, those that are worth most"
    )


def _drafts(limits: Limits) -> str:
    if not limits.drafts:
        return "none"
    return f"up to {limits.drafts} tokens by {' and '.join(limits.methods)}"


def _invariance(config: EngineConfig) -> list[str]:
    """A line where tokens depend on their request alone."""
    if not config.args.batch_invariant:
        return []
    return [
        "batch invariant: tokens depend on their request alone; engines with the same options, "
        "weights, code and kind of processor answer alike"
    ]


def summary(engine: Engine) -> str:
    """The resolved configuration, one line for each topic, for the log."""
    config, limits = engine.config, engine.scheduler.limits
    assert config is not None
    states = f"state {config.state_dtype}, window {config.window}; "
    resume = f"at {limits.num_snapshots} snapshots"
    if limits.cache_policy == "page":  # a prefix is its pages: no layer has a state
        states, resume = "", "at any page"
    return "\n".join(
        [
            f"model {config.args.model}: {config.dtype} on {config.device}, "
            f"tensor_parallel_size {config.args.tensor_parallel_size}",
            f"max_model_len {limits.max_model_len}, max_num_seqs {limits.max_num_seqs}, "
            f"max_num_batched_tokens {limits.max_num_batched_tokens}",
            f"KV {config.kv_dtype}: {limits.num_pages - 1} pages of {limits.page_size} tokens; "
            f"{states}cached prompts resume {resume}",
            f"prefix cache: {_conversations(limits)}",
            f"drafts: {_drafts(limits)}; pipeline depth {int(config.async_scheduling)}",
            *_invariance(config),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="millrace.replica.process")
    parser.add_argument("--args", required=True, help="EngineArgs as JSON")
    parser.add_argument("--socket-dir", type=Path, help="the directory of the server's sockets")
    parser.add_argument("--parent-pid", type=int, default=os.getppid())
    options = parser.parse_args()
    end_with_parent(options.parent_pid)
    protect_standard_streams()
    set_up_logs(f"rank {os.environ['RANK']}" if options.socket_dir is None else "engine")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server process decides when to stop
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # prints its stacks while it runs
    args = msgspec.json.decode(options.args, type=EngineArgs)
    if options.socket_dir is None:
        return run_rank(args)
    return serve(args, options.socket_dir, options.parent_pid)


if __name__ == "__main__":
    sys.exit(main())
