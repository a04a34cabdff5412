"""What one replica does in the long run, in a closed or an open loop, from its step model.

Rows decode, and the prompts of those that follow are computed beside them. A share of all steps is
mixed; the mean of both is the time that a stream waits for its next tokens. In a closed loop the
identity N = requests/s x (TTFT + (output - 1) x TPOT) holds for what is returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from millrace.model.work import StepShape
from millrace.plan.model.step_model import StepModel
from millrace.plan.predict.load import Load, Settings, accepted

SEARCH, NEAR = 20, 1e-3  # of the streams of an open loop: steps at most, and when one is right
ROUNDS, CLOSE = 60, 1e-5  # of the fixed point: at most, and when it has been found
# Relative standard deviation of the streams of ranks behind one address: one engine was seen with
# 801 waiting requests beside one that had none.
UNEVEN, NORMAL = 0.4, NormalDist()
DRAIN = 1.1  # the last streams of a run end so much later than a mean request takes to decode


@dataclass(frozen=True, slots=True)
class Steady:
    """One replica in the long run. rows: that decode. step, decode_step, mixed_step: seconds of a
    step in the mean, without prompts, with them. mixed: share of steps with prompts. ttft, tpot,
    itl: seconds. joules: for a token, in and out. tokens_per_step: of a row. ceiling: requests a
    second with all slots in use. waiting: streams that wait for a slot. limit: what binds."""

    requests: float
    rows: float
    step: float
    decode_step: float
    mixed_step: float
    mixed: float
    ttft: float
    tpot: float
    itl_p50: float
    itl_p99: float
    joules: float
    tokens_per_step: float
    waiting: float
    input: float
    output: float
    limit: str

    @property
    def total_tokens(self) -> float:
        """Tokens a second, prompts and outputs."""
        return self.requests * (self.input + self.output)

    @property
    def output_tokens(self) -> float:
        return self.requests * self.output


@dataclass(frozen=True, slots=True)
class _Steps:
    """Times of the steps with so many decode rows. piece: prompt tokens in a mixed one."""

    decode: float
    mixed: float
    piece: float
    share: float

    @property
    def mean(self) -> float:
        return (1 - self.share) * self.decode + self.share * self.mixed


class Replica:
    """One replica under one load."""

    def __init__(self, model: StepModel, load: Load, settings: Settings, shift: float = 0.0):
        load.check()
        self.model, self.load, self.settings = model, load, settings
        self.drafts = model.description.drafts
        self.tokens = accepted(load, self.drafts, shift)
        self._capacity: float | None = None
        self.decode_steps = max(1.0, (load.output - 1) / self.tokens) if load.output > 1 else 0.0

    # --- loops ----------------------------------------------------------------------------------

    def closed(self, streams: float) -> Steady:
        """With so many streams, each of which sends a request when its last one has ended."""
        slots = self._slots(streams)
        away = self._away(streams)
        held = max(1.0, slots * (1 - away)) if slots > 1 else slots
        rows, steps, prompt = held, self._steps(held, held), 0.0
        for _ in range(ROUNDS):
            steps = self._steps(rows, held)
            prompt = self._prompt_seconds(steps, held)
            rate = held / (prompt + self.decode_steps * steps.mean)
            limit = self._prompt_limit(steps)
            rate = min(rate, limit)
            wanted = min(rate * self.decode_steps * steps.mean, held)
            last, rows = rows, 0.4 * rows + 0.6 * max(wanted, 1e-3)
            if abs(rows - last) < CLOSE * rows:
                break
        tpot = steps.mean / self.tokens
        ttft = streams / rate - (self.load.output - 1) * tpot
        return self._steady(rate, rows, steps, max(ttft, prompt), tpot, streams - slots)

    def open(self, rate: float) -> Steady | None:
        """With so many requests a second; None if the replica cannot keep up."""
        high = float(self.settings.max_num_seqs)
        if rate >= self.capacity():
            return None
        # Streams by false position in logarithms, between so few that they hardly meet and all.
        low = 1e-3
        below, above = (math.log(self.closed(n).requests / rate) for n in (low, high))
        found = self.closed(high)
        for _ in range(SEARCH):
            share = below / (below - above)
            middle = low ** (1 - share) * high**share
            found = self.closed(middle)
            error = math.log(found.requests / rate)
            if abs(error) < NEAR:
                break
            if error < 0:
                low, below, above = middle, error, above / 2
            else:
                high, above, below = middle, error, below / 2
        return found

    def capacity(self) -> float:
        """Requests a second with every slot in use."""
        if self._capacity is None:
            self._capacity = self.closed(float(self.settings.max_num_seqs)).requests
        return self._capacity

    def run_seconds(self, steady: Steady, streams: float) -> float:
        """Seconds of a run of `load.requests`: at the end fewer and fewer streams are left, and no
        prompt comes beside them. A run of one batch computes all prompts first."""
        streams = min(streams, self.load.requests, float(self.settings.max_num_seqs))
        if self.load.requests <= streams * 1.5:
            return self._batch_seconds(streams)
        left = streams * self.load.output / 2
        whole = self.load.requests * (self.load.input + self.load.output)
        last = self._decode_seconds(streams / 2)
        drain = DRAIN * self.decode_steps * last
        return (whole - left) / steady.total_tokens + drain

    def _batch_seconds(self, streams: float) -> float:
        """All prompts in the largest steps there are, then all rows decode."""
        budget = float(self.settings.max_num_batched_tokens)
        tokens = self.load.requests * self.load.computed
        piece = min(budget, tokens)
        prompts = piece / self.load.computed
        pieces = max(1.0, self.load.computed / piece)
        step = self._mixed_seconds(0.0, prompts, piece, pieces)
        return tokens / piece * step + self.decode_steps * self._decode_seconds(streams)

    # --- parts ----------------------------------------------------------------------------------

    def _slots(self, streams: float) -> float:
        """Streams that have a slot, in the mean over ranks that get unequal numbers of them."""
        most = float(self.settings.max_num_seqs)
        if self.settings.ranks == 1:
            return min(streams, most)
        deviation = UNEVEN * streams
        z = (most - streams) / deviation
        lost = deviation * (NORMAL.pdf(z) - z * (1 - NORMAL.cdf(z)))
        return min(streams, most) if lost <= 0 else min(most, streams - lost)

    def _away(self, streams: float) -> float:
        """Share of the streams that are neither in a prompt nor decoding: in the server process, or
        at a rank that has more of them than the others."""
        if not self.settings.served or streams < 8:
            return 0.0
        return min(0.6, self.model.rates["away"] * (1 if self.settings.ranks > 1 else 0.3))

    def _piece(self, rows: float) -> float:
        """Prompt tokens of a mixed step: a whole prompt, or as many as come in a step."""
        cap = float(self.settings.mixed or self.settings.max_num_batched_tokens)
        if rows <= 1 or self.settings.apart:
            cap = float(self.settings.max_num_batched_tokens)
        coming = rows * self.tokens * self.load.computed / self.load.output
        return min(cap, max(self.load.computed, coming))

    def _steps(self, rows: float, held: float) -> _Steps:
        piece = self._piece(held)
        decode = self._decode_seconds(rows)
        prompts = piece / self.load.computed
        pieces = max(1.0, self.load.computed / piece)
        others = max(0.0, (held - 1) / held) if held > 0 else 0.0
        share = rows * self.tokens / self.load.output / max(prompts, 1e-9) * others
        beside = 0.0 if self.settings.apart else rows * others
        mixed = self._mixed_seconds(beside, prompts, piece, pieces)
        if self.settings.apart:
            mixed += decode
        return _Steps(decode, mixed, piece, min(1.0, share))

    def _decode_seconds(self, rows: float) -> float:
        shape = StepShape.of(rows, 1 + self.drafts, self.load.context)
        return self._seconds(shape, rows)

    def _mixed_seconds(self, rows: float, prompts: float, piece: float, pieces: float) -> float:
        """prompts: that end in a mixed step; a prompt of several pieces ends in the last one."""
        count, length = max(1.0, prompts), piece / max(1.0, prompts)
        start = self.load.cached + (self.load.computed - length) / 2
        beside = StepShape.of(rows, 1 + self.drafts, self.load.context)
        chunks = StepShape.of(prompts=count, length=length, start=start, last=1 / pieces)
        both = {name: getattr(beside, name) + getattr(chunks, name) for name in StepShape.__slots__}
        return self._seconds(StepShape(**both), rows + count / pieces, count / pieces)

    def _seconds(self, shape: StepShape, chunks: float, ended: float = 0.0) -> float:
        """With what the server process takes for the chunks of a step and for new requests."""
        found = float(self.model.seconds(shape))
        if self.settings.served:
            server = self.model.server
            found += server.chunk_seconds * chunks + server.request_seconds * ended
        return found

    def _prompt_seconds(self, steps: _Steps, held: float) -> float:
        """From admission to the first token: the rest of the step that runs, the one that is
        launched behind it, a queue for the prompt tokens of a step, then its own pieces."""
        pieces = max(1.0, self.load.computed / steps.piece)
        if held <= 1:
            return pieces * steps.mixed
        cap = float(self.settings.mixed or self.settings.max_num_batched_tokens)
        coming = held * self.tokens * self.load.computed / self.load.output
        used = min(0.95, coming / cap * steps.mixed / steps.mean)
        queue = used / (2 * (1 - used)) * self.load.computed / cap * steps.mixed
        ahead = 1.5 if held > 4 else 0.5
        return pieces * steps.mixed + ahead * steps.mean + queue

    def _prompt_limit(self, steps: _Steps) -> float:
        """Requests a second if every step computes prompts."""
        return steps.piece / self.load.computed / steps.mixed

    def _steady(
        self,
        rate: float,
        rows: float,
        steps: _Steps,
        ttft: float,
        tpot: float,
        waiting: float,
    ) -> Steady:
        mostly = steps.mixed if steps.share > 0.5 else steps.decode
        return Steady(
            requests=rate,
            rows=rows,
            step=steps.mean,
            decode_step=steps.decode,
            mixed_step=steps.mixed,
            mixed=steps.share,
            ttft=ttft,
            tpot=tpot,
            itl_p50=mostly,
            itl_p99=self._itl_p99(rows, steps),
            joules=self._joules(rate, rows, steps),
            tokens_per_step=self.tokens,
            waiting=waiting,
            input=self.load.input,
            output=self.load.output,
            limit=self._limit(rows, steps),
        )

    def _itl_p99(self, rows: float, steps: _Steps) -> float:
        """The gap behind the largest of 100 steps: prompts come as they like, up to the limit."""
        if steps.share < 0.01:
            return steps.decode
        cap = float(self.settings.mixed or self.settings.max_num_batched_tokens)
        coming = rows * self.tokens / self.load.output
        burst = (coming + 2.33 * math.sqrt(coming)) * self.load.computed
        piece = min(cap, max(burst, self.load.computed))
        prompts = piece / self.load.computed
        found = self._mixed_seconds(rows, prompts, piece, max(1.0, 1 / prompts))
        return found + (steps.decode if self.settings.apart else 0.0)

    def _joules(self, rate: float, rows: float, steps: _Steps) -> float:
        """Energy of the mean step over its tokens."""
        width = 1 + self.drafts
        decode = StepShape.of(rows, width, self.load.context)
        prompts = steps.piece / self.load.computed
        chunk = StepShape.of(prompts=max(1.0, prompts), length=steps.piece / max(1.0, prompts))
        joules = self.model.joules
        both: Any = joules(decode) * (1 - steps.share) + steps.share * (
            joules(replace(chunk, decode_rows=rows, decode_tokens=rows * width,
                           decode_context=decode.decode_context))
        )  # fmt: skip
        tokens = rate * (self.load.input + self.load.output) * steps.mean
        return float(both) / tokens if tokens else 0.0

    def _limit(self, rows: float, steps: _Steps) -> str:
        """What most of a step's time goes to, in words."""
        shape = StepShape.of(rows, 1 + self.drafts, self.load.context)
        parts = {k: float(v) for k, v in self.model.parts(shape).items()}
        parts["host and server"] = steps.decode - sum(parts.values())
        parts["prompts"] = steps.share * (steps.mixed - steps.decode)
        return max(parts, key=lambda name: parts[name])
