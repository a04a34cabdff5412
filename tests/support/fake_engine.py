"""An engine without a model, for tests of the front: it echoes each prompt, round and round.

It speaks the same messages over the same sockets as the real one, and keeps the same promises:
max_tokens, stop tokens, bounds of reasoning, aborts, a bounded number of running requests. How it
behaves comes as JSON in the environment variable MILLRACE_FAKE_ENGINE, with the fields of
`Behaviour`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

import msgspec
import zmq

from millrace.config import EngineArgs
from millrace.protocol import (
    Abort,
    AddRequest,
    CacheReport,
    Delta,
    DraftStats,
    EngineStats,
    Failed,
    FinishReason,
    Outputs,
    Ready,
    ResetPrefixCache,
    SetPaused,
    Shutdown,
    ToEngine,
    TokenLogprobs,
)
from millrace.replica.watchdog import REPORT, Watchdog

VARIABLE = "MILLRACE_FAKE_ENGINE"


class Behaviour(msgspec.Struct, frozen=True):
    """load, step: seconds until ready, and for a step. tokens: how many a step gives a request.

    fail: a message to fail with instead of getting ready. die_after: requests after which the
    process exits at once. refuse: token id that makes the engine refuse a prompt. deaf: ignore
    Shutdown and SIGTERM's politeness alike. eos: the token that ends a text. stuck: token id
    that makes the step with it never end. mute: one that makes the process stop (SIGSTOP).
    explains: it says what its prefix cache had, which is half of every prompt.
    """

    load: float = 0.0
    step: float = 0.001
    tokens: int = 1
    fail: str | None = None
    user_error: bool = True
    die_after: int | None = None
    refuse: int | None = None
    deaf: bool = False
    eos: int | None = None
    stuck: int | None = None
    mute: int | None = None
    explains: bool = False


class Echo:
    """One request. Its output token i is token i of the prompt, which starts over at its end.

    Token t has the log-probability -(t % 8) / 8; beside it t + 1, t + 2, … are reported.
    """

    def __init__(self, request: AddRequest, behaviour: Behaviour) -> None:
        self.id = request.id
        eos, self._explains = behaviour.eos, behaviour.explains
        self._prompt = request.prompt
        self._params = request.params
        self._limit = request.params.max_tokens or 1
        self._stops = set(request.params.stop_token_ids)
        if eos is not None and not request.params.ignore_eos:
            self._stops.add(eos)
        self._sent = len(request.resume)
        self._resumed = request.resume
        self._bound = request.reasoning
        if self._bound is not None and self._bound.end in self._resumed:
            self._bound = None
        self._first = True

    def step(self, count: int) -> Delta:
        first, self._first = self._first, False
        if first and self._resumed and (reason := self._ends(self._resumed[-1])):
            return self._delta([], reason, first)
        tokens: list[int] = []
        while len(tokens) < count:
            token = self._next()
            tokens.append(token)
            self._sent += 1
            if reason := self._ends(token):
                return self._delta(tokens, reason, first)
        return self._delta(tokens, None, first)

    def _next(self) -> int:
        token = self._prompt[self._sent % len(self._prompt)]
        if self._bound is not None and self._sent >= self._bound.tokens:
            token = self._bound.end
        if self._bound is not None and token == self._bound.end:
            self._bound = None
        return token

    def _ends(self, token: int) -> FinishReason | None:
        if token in self._stops and self._sent >= self._params.min_tokens:
            return "stop"
        return "length" if self._sent == self._limit else None

    def _delta(self, tokens: list[int], reason: FinishReason | None, first: bool) -> Delta:
        """Half the prompt was cached; that is told with the first tokens only."""
        params = self._params
        prompt = None
        if first and params.prompt_logprobs is not None:
            prompt = [_logprobs(token, params.prompt_logprobs) for token in self._prompt[1:]]
        half = len(self._prompt) // 2
        return Delta(
            self.id,
            tokens,
            reason,
            (tokens or self._resumed)[-1] if reason == "stop" else None,
            half if first else 0,
            logprobs=None
            if params.logprobs is None
            else [_logprobs(token, params.logprobs) for token in tokens],
            prompt_logprobs=prompt,
            queued=0.0 if first and self._explains else None,
            cache=CacheReport(half, half) if first and self._explains else None,
        )


def _logprobs(token: int, count: int) -> TokenLogprobs:
    tokens = [token, *range(token + 1, token + 1 + count)]
    return TokenLogprobs(tokens, [-(t % 8) / 8 for t in tokens], 1)


class FakeEngine:
    """The loop of a replica, with arithmetic in place of a model."""

    def __init__(self, args: EngineArgs, directory: Path, behaviour: Behaviour) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._incoming = context.socket(zmq.PULL)
        self._incoming.connect(f"ipc://{directory}/to-engine")
        self._outgoing = context.socket(zmq.PUSH)
        self._outgoing.connect(f"ipc://{directory}/from-engine")
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._behaviour = behaviour
        self._directory = directory
        self._step_timeout = args.step_timeout
        self._max_len = args.max_model_len or 1024
        self._seats = args.max_num_seqs or 64
        self._waiting: deque[Echo] = deque()
        self._running: dict[str, Echo] = {}
        self._paused = False
        self._resets = 0
        self._steps = self._prompt_tokens = self._generated = self._seen = 0

    def run(self, parent: int) -> int:
        behaviour = self._behaviour
        time.sleep(behaviour.load)
        if behaviour.fail is not None:
            self._send(Failed(behaviour.fail, behaviour.user_error))
            self._outgoing.close(linger=1000)
            return 2 if behaviour.user_error else 1
        self._send(Ready(self._max_len, self._seats, 100, 16, "fake engine: echoes prompts"))
        watchdog = Watchdog(self._step_timeout, self._directory / REPORT)
        heard = 0.0
        while os.getppid() == parent:
            now = time.monotonic()
            watchdog.beat(now)
            messages = self._receive()
            if any(isinstance(message, Shutdown) for message in messages) and not behaviour.deaf:
                return 0
            deltas = [delta for message in messages for delta in self._take(message)]
            deltas += [] if self._paused else self._step()
            if deltas or messages or now - heard >= 1.0:
                heard = now
                self._send(Outputs(deltas, self._stats()))
        return 0

    def _receive(self) -> list[ToEngine]:
        messages: list[ToEngine] = []
        wait = 0 if (self._running or self._waiting) and not self._paused else 100
        while self._incoming.poll(wait):
            messages.append(self._decode(self._incoming.recv()))
            wait = 0
        return messages

    def _take(self, message: ToEngine) -> list[Delta]:
        if isinstance(message, Abort):
            for request_id in message.ids:
                self._running.pop(request_id, None)
            self._waiting = deque(one for one in self._waiting if one.id not in message.ids)
        elif isinstance(message, SetPaused):
            self._paused = message.paused
        elif isinstance(message, ResetPrefixCache):
            self._resets += 1
        elif isinstance(message, AddRequest):
            self._seen += 1
            if self._seen == self._behaviour.die_after:
                os._exit(17)
            if self._behaviour.refuse in message.prompt:
                return [Delta(message.id, [], "error", error="this prompt can never run")]
            if self._behaviour.stuck in message.prompt:
                time.sleep(1000)
            if self._behaviour.mute in message.prompt:
                os.kill(os.getpid(), signal.SIGSTOP)
            self._prompt_tokens += len(message.prompt)
            self._waiting.append(Echo(message, self._behaviour))
        return []

    def _step(self) -> list[Delta]:
        while self._waiting and len(self._running) < self._seats:
            one = self._waiting.popleft()
            self._running[one.id] = one
        if not self._running:
            return []
        time.sleep(self._behaviour.step)
        self._steps += 1
        deltas = [one.step(self._behaviour.tokens) for one in self._running.values()]
        for delta in deltas:
            self._generated += len(delta.token_ids)
            if delta.finish_reason is not None:
                del self._running[delta.id]
        return deltas

    def _stats(self) -> EngineStats:
        return EngineStats(
            steps=self._steps,
            paused=self._paused,
            snapshots_used=self._resets,
            running=len(self._running),
            waiting=len(self._waiting),
            free_pages=70,
            evictable_pages=5,
            total_pages=100,
            prompt_tokens=self._prompt_tokens,
            prefilled_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            prefix_queries=self._prompt_tokens,
            prefix_hits=self._prompt_tokens // 2,
            drafts=self._steps,
            draft_tokens=2 * self._steps,
            accepted_per_position=[self._steps // 2, self._steps // 4],
            steps_by_depth={2: self._steps},
            draft_methods={
                "mtp": DraftStats(
                    self._steps, 2 * self._steps, [self._steps // 2, self._steps // 4]
                )
            },
        )

    def _send(self, message: Outputs | Ready | Failed) -> None:
        self._outgoing.send(msgspec.msgpack.encode(message))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--args", required=True)
    parser.add_argument("--socket-dir", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args()
    behaviour = msgspec.json.decode(os.environ.get(VARIABLE, "{}"), type=Behaviour)
    if behaviour.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    args = msgspec.json.decode(options.args, type=EngineArgs)
    return FakeEngine(args, options.socket_dir, behaviour).run(options.parent_pid)


if __name__ == "__main__":
    sys.exit(main())
