"""One request: its life cycle (waiting, prefill, decode, done) and the resources that it owns.

A request owns a slot and pages from its admission until the last step that names it has completed.
It knows no other request and makes no decision.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from millrace.protocol import AddRequest, CacheReport, FinishReason, TokenLogprobs


class Phase(Enum):
    """The state of a request. A step's rows are classified by it, never by their token count."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(eq=False, slots=True)
class Request:
    """One request and its resources.

    tokens: every token that the host knows, int32, prompt first. computed: prompt tokens planned so
    far. upper: an upper bound of the tokens in the caches after all launched steps. in_flight:
    launched steps that name the request. boundaries: positions, in whole pages, where prefill stops
    for a snapshot, nearest last. held_pages, held_snapshot: of the prefix cache, read by its first
    step. report: what the cache had of its prompt. hashes: of its whole pages, for lower tiers.
    loading: a transfer brings its prefix. loaded: from and to which token of its prefix came from a
    lower tier, or from another engine (remote), by name. expected: tokens that must be cached when
    it is admitted, because another engine has computed them. handed_over: tokens of its record that
    others may take; -1: nobody has tried. not_handed_over: why they may not.
    ordinal: requests are numbered as they come.
    prompt_cached: its whole prompt is computed, so another request may find it in the cache.
    split: some step computed only a part of its prompt, for want of budget. cached_estimate: prompt
    tokens in the prefix cache at its version `estimate_version`. overtaken: requests of later rank
    admitted while this one was the first of those that lack pages. prompt_logprobs: of the prompt,
    from its second token on.
    """

    id: str
    prompt_len: int
    tokens: array[int]
    max_total: int
    stop_ids: frozenset[int]
    seed: int
    ordinal: int
    source: AddRequest
    phase: Phase = Phase.WAITING
    slot: int = 0
    pages: list[int] = field(default_factory=list)
    held_pages: list[int] = field(default_factory=list)
    held_snapshot: int = -1
    report: CacheReport | None = None
    hashes: list[bytes] = field(default_factory=list)
    loading: bool = False
    loaded: dict[str, tuple[int, int]] = field(default_factory=dict)
    expected: int = 0
    handed_over: int = -1
    not_handed_over: str = ""
    computed: int = 0
    upper: int = 0
    in_flight: int = 0
    boundaries: list[int] = field(default_factory=list)
    split: bool = False
    cached_estimate: int = 0
    estimate_version: int = -1
    overtaken: int = 0
    cached_tokens: int = 0
    queue_seconds: float = 0.0  # seconds from its arrival to its first admission
    prompt_counted: bool = False  # its prompt is in the prefix cache statistics
    prompt_cached: bool = False
    ended: bool = False  # by its own last token, so its slot keeps the state before that token
    failed: bool = False  # its logits were not finite, so what it computed must not be used
    first_delta_sent: bool = False
    preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    acceptance: list[float] = field(
        default_factory=list
    )  # of drafts behind accepted ones, by position

    @property
    def missing(self) -> int:
        """Prompt tokens left to compute; an estimate while the request waits."""
        done = self.cached_estimate if self.phase is Phase.WAITING else self.computed
        return len(self.tokens) - done

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    def finish_reason(self) -> FinishReason | None:
        """Why the request has ended, by its last token; None while it runs.

        The device truncates its output by the same rule, so both sides agree.
        """
        if self.generated and self.tokens[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.max_total else None
