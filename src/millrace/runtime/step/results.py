"""What a launched step brings back: tensors on the device, then plain numbers on the host.

On a GPU the tensors are copied to pinned memory behind the step, and reading them waits for that
copy alone; on a CPU they are there already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from millrace.kernels.sampling import NOT_FINITE
from millrace.protocol import PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from millrace.runtime.step.logits_processors import Logprobs
from millrace.runtime.step.slots import METHOD

AHEAD = 2  # numbers of a row before its tokens


@dataclass(frozen=True, slots=True)
class StepOutput:
    """A step's result. R sampled rows, `width` candidates a decode row.

    tokens: int64 [R, 2 + width]: what `Slots.drafted` had of the row, the count of new tokens, then
    the tokens; None where no row samples. The last new token of a row may be NOT_FINITE. logprobs:
    by candidate, `width` a row. prompt: (slot, position, log-probabilities) of pieces of prompts.
    drafts: int64 [R, k], in steps with masks.
    """

    tokens: Tensor | None = None
    logprobs: Logprobs | None = None
    prompt: list[tuple[int, int, Logprobs]] = field(default_factory=list)
    drafts: Tensor | None = None


class PendingStep:
    """A launched step, to be read once it has run.

    It has run when all of it has, also where it brings nothing: otherwise the host would launch
    every step of a long prompt at once, and a request that arrives meanwhile would wait for them.

    wait: how the host waits for the device.
    """

    def __init__(
        self,
        plan: StepPlan,
        output: StepOutput,
        on_gpu: bool,
        wait: Callable[[torch.cuda.Event], None] = torch.cuda.Event.synchronize,
    ) -> None:
        self._wait = wait
        self._step = plan.step
        self._slots = plan.sampled_slots
        self._ready: torch.cuda.Event | None = None
        if on_gpu:
            output = _to_host(output)
            self._ready = torch.cuda.Event()
            self._ready.record()
        self._output = output

    def result(self) -> StepResult:
        """Wait for the step and read what it brought."""
        if self._ready is not None:
            self._wait(self._ready)
        out = self._output
        rows = [] if out.tokens is None else out.tokens.tolist()
        tokens = [row[AHEAD : AHEAD + row[AHEAD - 1]] for row in rows]
        not_finite = [at for at, new in enumerate(tokens) if new and new[-1] == NOT_FINITE]
        for at in not_finite:
            tokens[at].pop()
        return StepResult(
            self._step,
            self._slots,
            tokens,
            logprobs=self._logprobs(len(rows[0]) - AHEAD) if out.logprobs and rows else {},
            prompt_logprobs=[
                PromptLogprobs(slot, start, _lines(part)) for slot, start, part in out.prompt
            ],
            drafts=[] if out.drafts is None else out.drafts.tolist(),
            not_finite=not_finite,
            drafted=[(row[0] % METHOD, row[0] // METHOD) for row in rows],
        )

    def _logprobs(self, width: int) -> dict[int, list[TokenLogprobs]]:
        """By sampled row, its candidates' in order."""
        assert self._output.logprobs is not None
        found: dict[int, list[TokenLogprobs]] = {}
        lines = _lines(self._output.logprobs)
        for index, line in zip(self._output.logprobs.rows, lines, strict=True):
            found.setdefault(index // width, []).append(line)
        return found


def _lines(part: Logprobs) -> list[TokenLogprobs]:
    table = zip(part.ids.tolist(), part.values.tolist(), part.ranks.tolist(), strict=True)
    return [TokenLogprobs(ids, values, rank) for ids, values, rank in table]


def _to_host(output: StepOutput) -> StepOutput:
    """The same in pinned memory, once the stream has come to it."""
    return StepOutput(
        tokens=_pinned(output.tokens),
        logprobs=output.logprobs and _pinned_logprobs(output.logprobs),
        prompt=[(slot, start, _pinned_logprobs(part)) for slot, start, part in output.prompt],
        drafts=_pinned(output.drafts),
    )


def _pinned_logprobs(part: Logprobs) -> Logprobs:
    ids, values, ranks = (_copy(x) for x in (part.ids, part.values, part.ranks))
    return replace(part, ids=ids, values=values, ranks=ranks)


def _pinned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _copy(tensor)


def _copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
