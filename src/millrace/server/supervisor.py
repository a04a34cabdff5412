"""The parent of a server process: it starts the server again when a crash has ended it.

It holds the listening sockets, so that a restarted server has the same port and connections wait
meanwhile. It passes signals on and ends with the server's exit status. It knows no HTTP and no
engine, and it reads nothing from clients, so that no request can end it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from time import monotonic
from types import FrameType

from millrace.common.backoff import Backoff, BackoffPolicy
from millrace.common.child_process import child_environment, end_with_parent
from millrace.common.sockets import listen, listen_unix
from millrace.server.options import ServerOptions

logger = logging.getLogger(__name__)

VARIABLE = "MILLRACE_SERVER_SOCKETS"  # "PID:FD,FD": the supervisor, and the sockets it holds
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
RESTARTS = BackoffPolicy()
FAILED = 1  # the exit status once no restart is left


def supervise(
    command: Sequence[str],
    listeners: Sequence[socket.socket],
    max_restarts: int,
    policy: BackoffPolicy = RESTARTS,
) -> int:
    """Run a server command until it ends by itself. Returns its exit status.

    A server that a signal has ended is started again, at most `max_restarts` times in a row; after
    that the status is 1. Must be called in the main thread, which handles signals.
    """
    return _Supervisor(command, listeners, max_restarts, Backoff(policy)).run()


def hangups_are_ignored() -> bool:
    """Whether this process was started under nohup."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def is_supervised() -> bool:
    """Whether this process was started by a supervisor whose sockets it has not taken yet."""
    return VARIABLE in os.environ


def open_listeners(options: ServerOptions) -> list[socket.socket]:
    """Sockets that listen where the options say. Raises ConfigError."""
    if options.uds is not None:
        return [listen_unix(options.uds, "--uds")]
    return listen(options.host, options.port)


def inherited_listeners() -> list[socket.socket] | None:
    """In a server process: the supervisor's sockets; None where there is no supervisor.

    From then on the process ends with its supervisor, and its children do not get the sockets.
    """
    given = os.environ.pop(VARIABLE, None)
    if given is None:
        return None
    parent, _, descriptors = given.partition(":")
    end_with_parent(int(parent))
    listeners = [socket.socket(fileno=int(one)) for one in descriptors.split(",")]
    for listener in listeners:
        listener.set_inheritable(False)
        listener.setblocking(False)
    return listeners


class _Supervisor:
    """stopping: a signal has asked the server to end, so that no other one is started."""

    def __init__(
        self,
        command: Sequence[str],
        listeners: Sequence[socket.socket],
        max_restarts: int,
        backoff: Backoff,
    ) -> None:
        self._command = command
        self._descriptors = [listener.fileno() for listener in listeners]
        self._max_restarts = max_restarts
        self._backoff = backoff
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    def run(self) -> int:
        heard = [one for one in FORWARDED if one != signal.SIGHUP or not hangups_are_ignored()]
        previous = {number: signal.signal(number, self._forward) for number in heard}
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        while True:
            began = monotonic()
            status = self._run_once()
            if status >= 0:
                return status
            how = f"the server process ended with signal {-status}"
            if self._stopping.is_set():
                return 128 - status
            pause = self._backoff.failed(monotonic() - began)
            if self._backoff.failures > self._max_restarts:
                logger.error("%s; no restart is left", how)
                return FAILED
            logger.error(
                "%s; starting it again in %g s (death %d in a row)",
                how, pause, self._backoff.failures,
            )  # fmt: skip
            if self._stopping.wait(pause):
                return 0

    def _run_once(self) -> int:
        """One server process, to its end. Returns its status; below 0: the signal that ended it."""
        sockets = f"{os.getpid()}:{','.join(map(str, self._descriptors))}"
        self._process = subprocess.Popen(
            self._command,
            env=child_environment(**{VARIABLE: sockets}),
            pass_fds=self._descriptors,
            start_new_session=True,  # so a Ctrl-C at the terminal reaches it once, from here
        )
        if self._stopping.is_set():  # the signal came before there was a process
            self._process.terminate()
        return self._process.wait()

    def _forward(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGUSR1:  # that one asks for the server's stacks
            self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)
