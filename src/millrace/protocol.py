"""Messages between processes: between the API server and an engine, and between an engine's ranks.

Plain data (msgspec structs), encoded with msgpack. A message says what to do, not how. This module
knows no socket, no tensor and no policy.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from millrace.errors import RequestError
from millrace.vllm_keywords import KeywordMeta

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 20  # of a server that was told nothing else
MAX_LOGPROB_TOKEN_IDS = 128
MAX_STOP_IDS = 16  # tokens that end one request, EOS included; slots have space for so many


STRUCTURES = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must match. Exactly one of six fields is given. Names follow vLLM.

    json: a JSON schema. json_object: any JSON object. regex: a regular expression (Rust syntax).
    choice: one of these texts. grammar: a context-free grammar in the syntax of Lark, or of EBNF
    with `root ::= ...`. structural_tag: text in which some parts have a structure, as an object or
    its JSON. Of JSON: disable_any_whitespace: none stands between its tokens; whitespace_pattern:
    an expression for what may stand there; disable_additional_properties: objects have the
    properties that their schemas name, and no others.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = False
    disable_additional_properties: bool | None = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in STRUCTURES if getattr(self, name)]
        if len(given) != 1:
            raise RequestError(
                "structured_outputs takes exactly one of json, json_object, regex, choice, grammar "
                f"and structural_tag, got {' and '.join(given) or 'none'}",
                param="structured_outputs",
            )


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, metaclass=KeywordMeta):
    """How tokens of a request are sampled, and when it ends. Names and defaults follow vLLM.

    temperature: 0 is greedy. top_k: 0 or -1 keeps every token. seed: None: one is chosen at
    admission. max_tokens: None: as many as fit into max_model_len. stop: texts that end the request
    (the server finds them). stop_token_ids: tokens that end it (the device finds them). min_p:
    tokens with a probability below min_p times the highest one are excluded. min_tokens: nothing
    ends the request before. repetition_penalty counts prompt and output, the other penalties only
    the output. logprobs, prompt_logprobs: how many of the most probable tokens to report at each
    position, besides the token itself, from the model's own distribution; -1: all that there are.
    logprob_token_ids: report these tokens instead of the most probable ones. bad_words: texts that
    are never generated. n: number of outputs for the prompt. thinking_token_budget: the reasoning
    that an answer of `LLM.chat` begins with is closed after so many tokens; -1: it is not.
    speculative_method: the only one of the engine's methods that drafts for this request; "none":
    it has no drafts; None: all of them. No token depends on it.

    None is taken for the default of a list, and one text for a list of it. Other keywords of vLLM
    are accepted where they change nothing (`millrace.vllm_keywords`).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    thinking_token_budget: int | None = None
    speculative_method: str | None = None

    def __post_init__(self) -> None:
        """Raise RequestError for the first value out of its range."""
        for name in ("stop", "stop_token_ids", "bad_words"):
            given = getattr(self, name)
            if given is None or isinstance(given, str):
                whole = [] if given is None else [given]
                msgspec.structs.force_setattr(self, name, whole)
        self._require("n", self.n >= 1, "at least 1")
        self._require("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        self._require("top_k", self.top_k >= -1, "-1 or 0 (every token) or at least 1")
        self._require("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, -2.0 <= getattr(self, name) <= 2.0, "between -2 and 2")
        self._require(
            "repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, at most 100"
        )
        bias = self.logit_bias or {}
        self._require(
            "logit_bias",
            all(t >= 0 and -100.0 <= b <= 100.0 for t, b in bias.items()),
            "token ids >= 0 with values between -100 and 100",
        )
        self._require(
            "allowed_token_ids",
            self.allowed_token_ids is None
            or (bool(self.allowed_token_ids) and min(self.allowed_token_ids) >= 0),
            "a list of token ids >= 0 that is not empty",
        )
        self._require("bad_words", all(self.bad_words), "a list of texts that are not empty")
        self._require(
            "seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"
        )
        self._require("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._require("min_tokens", self.min_tokens >= 0, "at least 0")
        self._require(
            "min_tokens",
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"at most max_tokens, {self.max_tokens}",
        )
        self._require("stop", all(self.stop), "a list of texts that are not empty")
        self._require("stop_token_ids", all(t >= 0 for t in self.stop_token_ids), "token ids >= 0")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            self._require(name, wanted is None or wanted >= -1, "at least 0, or -1 for all")
        tokens = self.logprob_token_ids
        self._require(
            "logprob_token_ids",
            tokens is None or (1 <= len(set(tokens)) <= MAX_LOGPROB_TOKEN_IDS and min(tokens) >= 0),
            f"1 to {MAX_LOGPROB_TOKEN_IDS} token ids >= 0",
        )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            message = f"{name} must be {expected}, got {getattr(self, name)!r}"
            raise RequestError(message, param=name)


class Grammar(msgspec.Struct, frozen=True):
    """A grammar that the output must match, in the format of llguidance.

    start_after: the token that the grammar starts behind (the end of reasoning); None: at the
    start.
    """

    source: str
    start_after: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the token there, then the most probable ones, in order.

    logprobs are natural logarithms in the same order. rank: the first token's rank, from 1.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


# --- server -> engine --------------------------------------------------------------------------


class ReasoningBound(msgspec.Struct, frozen=True, array_like=True):
    """Token `end` closes the reasoning that an output begins with; where it has not come among the
    first `tokens`, it comes next."""

    tokens: int
    end: int


class RecordSource(msgspec.Struct, frozen=True, array_like=True):
    """Where the record of a prompt's beginning comes from: an engine, and the record's name there.

    host, port: where that engine hands records over. tokens: of the prompt that the record covers;
    0: it is still computed, and will cover as much of the prompt as a record can.
    """

    host: str
    port: int
    engine: str
    name: str
    tokens: int


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    """A request enters the engine.

    boundaries: prompt positions after which a shared prefix is likely to end (the end of a chat
    turn); the prefix cache takes its snapshots there. arrival: seconds, `time.monotonic()` of the
    server, which shares the engine's clock. resume: tokens that count as generated already; the
    request continues behind them. wait_for: the id of a request with the same prompt; this one
    waits until that one's prompt is cached. priority: lower ones run first. bad_words: the token
    sequences of `params.bad_words`. cache_salt: the prompt shares cached prefixes only with prompts
    of the same salt. pins: seconds for which the first snapshot of its prompt (behind the system
    prompt) and its last one are evicted after all others. tag: by which `Outputs.moved` names its
    prefix; 0: by none. hand_over: the name by which another engine may take the record of all
    prompt tokens but the last; empty: none may. source: the record that the prompt goes on from;
    without it the request does not run. background: others go first (engine/background.py).
    `params.n` is the server's business: each output is a request of its own.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    boundaries: list[int] = []
    arrival: float = 0.0
    resume: list[int] = []
    wait_for: str | None = None
    priority: int = 0
    bad_words: list[list[int]] = []
    cache_salt: str = ""
    grammar: Grammar | None = None
    reasoning: ReasoningBound | None = None
    pins: tuple[float, float] = (0.0, 0.0)
    tag: int = 0
    hand_over: str = ""
    source: RecordSource | None = None
    background: bool = False


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End these requests and free their resources: the client is gone, or a stop text was found."""

    ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Free everything and end the process; open requests are not finished."""


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    """Drop every cached prefix. Running requests keep their pages."""


class SetPaused(msgspec.Struct, frozen=True, tag="set_paused"):
    """Run no further step, or go on. Requests are taken in all the same."""

    paused: bool


ToEngine = AddRequest | Abort | ResetPrefixCache | SetPaused | Shutdown


# --- engine -> server --------------------------------------------------------------------------


class CacheReport(msgspec.Struct, frozen=True, array_like=True):
    """What the prefix cache had of a prompt, and where it left what is known.

    cached: tokens that were resumed from. known: tokens that an earlier prompt began with too.
    evicted: tokens of a snapshot between the two that was evicted; 0: there was none. before,
    prompt, other: a few tokens before that place, behind it, and behind it in the nearest other
    prompt. loaded: tiers below the device that brought a part, with the tokens from and to.
    written: tokens behind the cached ones that will be cached when it has been answered.
    """

    cached: int
    known: int
    evicted: int = 0
    before: list[int] = []
    prompt: list[int] = []
    other: list[int] = []
    loaded: dict[str, tuple[int, int]] = {}
    written: int = 0


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """The new tokens of one request from one step."""

    id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended the request, if one did
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    error: str | None = None
    queued: float | None = None  # with the first tokens: seconds from arrival to admission
    logprobs: list[TokenLogprobs] | None = None  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the prompt from its second token on
    model_failed: bool = False  # the error is the model's, not the request's
    preemptions: int = 0  # with the end: how often the request was put back for want of pages
    cache: CacheReport | None = None  # with the first tokens
    record: int = 0  # with the first tokens: how many the record has that is handed over
    record_error: str = ""  # with the first tokens: why none is, though it was asked for
    transfer_failed: bool = False  # the error is that of a record that did not come


class DraftStats(msgspec.Struct, array_like=True):
    """What one method drafted: rows, tokens in them, and those accepted at each position."""

    drafts: int = 0
    tokens: int = 0
    accepted: list[int] = []


class TransferStats(msgspec.Struct, frozen=True, array_like=True):
    """Records that went to other engines (sent) and came from them (received), since the start.

    pages, bytes: of these records. sent_failed: that nobody took before their lease ended, or that
    could not be offered. received_failed: that did not come whole. local: that were asked for and
    were here already. open: offered now. seconds: that receiving took, in all.
    """

    sent: int = 0
    sent_pages: int = 0
    sent_bytes: int = 0
    sent_failed: int = 0
    received: int = 0
    received_pages: int = 0
    received_bytes: int = 0
    received_failed: int = 0
    local: int = 0
    open: int = 0
    seconds: float = 0.0


STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class PartWork(msgspec.Struct, frozen=True, array_like=True):
    """Work of one kind since the engine started, on one rank. unit: what multiplied: fp4, fp8, bf16
    or fp32. flops: a multiply and an add are two. read, written: bytes of the device's memory."""

    unit: str
    flops: float
    read: float
    written: float


class WorkStats(msgspec.Struct, frozen=True):
    """What steps have computed and moved on one rank since the engine started, as the work model
    counts it from the sizes of the steps; parts by kind. seconds: in which a step ran."""

    seconds: float = 0.0
    parts: dict[str, PartWork] = {}


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges, and totals since the engine started.

    free_pages: nothing holds them. evictable_pages: only the prefix cache does, so they are there
    for whoever needs them. waiting_deferred: of those that wait, how many wait for something else
    than room: a grammar that is compiled, or a prompt that another request computes for them.
    step_tokens: how many steps computed up to so many tokens, prompts and outputs together, for
    each of STEP_TOKENS, and how many more than the last; steps without a token are not counted.
    step_tokens_sum: their tokens. expert_tokens: how many tokens each expert got, by layer, if that
    is reported; expert_ranks: ranks among which the experts of a layer are divided in this order.
    step_times: of steps that decode, that compute prompts, and that do both: their number, seconds,
    and seconds in which the device waited for the host.
    work: only in some messages, and only where a model's work can be counted.
    """

    steps: int = 0
    running: int = 0
    waiting: int = 0
    waiting_deferred: int = 0
    free_pages: int = 0
    evictable_pages: int = 0
    total_pages: int = 0
    snapshots_used: int = 0
    snapshots_total: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0  # of admitted requests, each prompt as a whole
    prefilled_tokens: int = 0  # computed by steps so far, those computed again included, or cached
    generated_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # of these, found
    host_hits: int = 0  # of these, loaded from the host's memory for this prompt
    disk_hits: int = 0  # of these, loaded from files for this prompt
    remote_hits: int = 0  # of these, computed by another engine
    remote_queries: int = 0  # prompt tokens that another engine was to have computed
    host_cache_used: int = 0  # bytes
    host_cache_total: int = 0
    disk_cache_used: int = 0
    disk_cache_total: int = 0
    drafts: int = 0  # rows with drafts
    draft_tokens: int = 0
    accepted_per_position: list[int] = []
    draft_methods: dict[str, DraftStats] = {}
    steps_by_depth: dict[int, int] = {}  # steps with decode rows, by the drafts that they verified
    rows_not_finite: int = 0  # ended because their logits were NaN or infinite
    step_tokens: list[int] = []
    step_tokens_sum: int = 0
    step_times: list[float] = []
    expert_tokens: dict[str, list[int]] = {}
    expert_ranks: int = 1
    work: WorkStats | None = None
    paused: bool = False  # no step runs until the server says so
    transfers: TransferStats = TransferStats()


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """Everything that one step brought, in one message. moved: prefixes, by their requests' tags,
    that are in another tier now: 4 the device, 2 the host's memory, 1 files, 0 none."""

    deltas: list[Delta]
    stats: EngineStats
    moved: dict[int, int] = {}


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine has loaded the model, planned its memory and completed a real request.

    devices: UUIDs of the GPUs of its ranks, as far as rank 0 knows them; empty on a CPU.
    device_name: of rank 0's device, as its driver says it. engine, transfer_host,
    transfer_port: by which others take its records; empty and 0: they cannot.
    """

    max_model_len: int
    max_num_seqs: int
    num_pages: int
    page_size: int
    summary: str
    devices: list[str] = []
    device_name: str = ""
    engine: str = ""
    transfer_host: str = ""
    transfer_port: int = 0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start, or has failed. user_error: caused by options of the user."""

    message: str
    user_error: bool


FromEngine = Outputs | Ready | Failed


# --- worker -> scheduler -----------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes that a scheduler works within. All are counts; lengths are in tokens.

    mixed_prefill_tokens: prompt tokens in a step that also has decode rows; 0: no limit of its own.
    long_prefill_token_threshold: a prompt with more tokens left to compute is long, and a step
    computes at most so many of it; 0: no prompt is long. max_num_partial_prefills,
    max_long_partial_prefills: prompts, and long ones among them, that are computed chunk by chunk
    at the same time; 0: no limit. num_pages counts the null page. snapshot_interval: 0 takes no
    snapshots at fixed distances. snapshot_distance: the least distance of a prompt's snapshots.
    methods: those that make drafts. depths: numbers of drafts that a step's rows may verify; empty:
    always `drafts`. depth_schedule: (least rows, most rows, depth). cache_policy: "snapshot":
    prompts resume at snapshots; "page": at any whole page. page_cost: memory of a page as a share
    of a snapshot's. host_cache, disk_cache: bytes of the lower tiers. page_bytes, snapshot_bytes:
    of one, on all ranks together. transfers: whether records go to other engines and come from
    them. lease: seconds for which a record is kept for whoever may take it. recompute: a request
    whose record does not come computes its prompt.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    num_pages: int
    num_snapshots: int
    drafts: int
    methods: list[str] = []
    depths: list[int] = []
    depth_schedule: list[tuple[int, int, int]] = []
    prefix_caching: bool = True
    cache_policy: Literal["snapshot", "page"] = "snapshot"
    page_cost: float = 0.0
    host_cache: int = 0
    disk_cache: int = 0
    page_bytes: int = 0
    snapshot_bytes: int = 0
    transfers: bool = False
    lease: float = 30.0
    recompute: bool = False
    snapshot_interval: int = 0
    snapshot_distance: int = 0
    mixed_prefill_tokens: int = 0
    long_prefill_token_threshold: int = 0
    max_num_partial_prefills: int = 0
    max_long_partial_prefills: int = 0
    priorities: bool = False
    vocab_size: int = 1 << 31
    eos_ids: frozenset[int] = frozenset()
    seed: int = 0


# --- scheduler -> every rank -------------------------------------------------------------------


class Extras(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling options that few requests use; names as in SamplingParams.

    prompt_len: where the output begins. min_total: no stop token is sampled at a position below
    it. bad_words: token sequences. logprobs, prompt_logprobs: -1: not asked for. masked: the
    output must match a grammar, whose masks come with each step. logprob_token_ids: report these
    tokens, not the most probable ones; empty: not asked for.
    """

    prompt_len: int
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    min_total: int = 0
    logprobs: int = -1
    logprob_token_ids: list[int] = []
    prompt_logprobs: int = -1
    masked: bool = False
    reasoning: ReasoningBound | None = None


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A request gets a slot: all that the device must know of it.

    tokens: every known token (prompt, and output before a preemption). start: how many of them a
    snapshot covers; 0: start from an empty state.
    max_total: the sequence never grows past this many tokens.
    seed: chosen by the scheduler, so that every rank and every replay samples the same tokens.
    """

    slot: int
    tokens: list[int]
    start: int
    snapshot: int  # index into the snapshot pool, or -1
    max_total: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_token_ids: list[int]
    extras: Extras | None = None
    methods: int = -1


class PageGrant(msgspec.Struct, frozen=True, array_like=True):
    """Pages to append to a slot's block table, the first of them at index `first`."""

    slot: int
    first: int
    pages: list[int]


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Prompt tokens [start, start + count) of a slot. last: the prompt ends here; sample."""

    slot: int
    start: int
    count: int
    last: bool


class Save(msgspec.Struct, frozen=True, array_like=True):
    """After the step, copy the slot's record (state, conv inputs, hidden) into a snapshot."""

    slot: int
    snapshot: int


class PageCopy(msgspec.Struct, frozen=True, array_like=True):
    """Copy a page's keys and values over another page's."""

    source: int
    target: int


class Move(msgspec.Struct, frozen=True, array_like=True):
    """Pages and a snapshot of the device, and where they are in the host's memory.

    pages: those of a range in memory for `count` pages, from its page `first` on; pages_at: where
    it begins, in bytes. snapshot, state_at: -1 if no state is moved.
    """

    pages: list[int]
    first: int
    count: int
    pages_at: int
    snapshot: int = -1
    state_at: int = -1


class FileMove(msgspec.Struct, frozen=True, array_like=True):
    """A record's files, and their contents in the host's memory; -1: not these.

    key: its name. parent, first, tokens, salt, kind: what the header says, to find it after a
    start.
    """

    key: str
    parent: str
    first: int
    tokens: list[int]
    salt: str
    kind: int
    pages_at: int
    pages_bytes: int
    state_at: int
    state_bytes: int


class FoundFile(msgspec.Struct, frozen=True):
    """What the header of a record's files says. used: when they were last used, on any clock."""

    parent: str
    first: int
    tokens: list[int]
    salt: str
    kind: int
    has_state: bool = False
    used: float = 0.0


class HostPages(msgspec.Struct, frozen=True, array_like=True):
    """Pages `first` to `end` of a range in the host's memory for `count` pages, which begins at
    byte `at`."""

    at: int
    count: int
    first: int
    end: int


class RecordMove(msgspec.Struct, frozen=True, array_like=True):
    """A record in the host's memory that another engine takes from there, or that comes there.

    pages: where its pages are, from its page `first` on. state_at: likewise; -1: a prefix is its
    pages. source: where it comes from. seconds: within which it must be taken, or its next part
    come. refused: why it is not offered after all. ready: its first pages that may be taken while
    the rest is computed; -1: all of it.
    """

    name: str
    first: int
    pages: list[HostPages]
    state_at: int
    seconds: float
    source: RecordSource | None = None
    refused: str = ""
    ready: int = -1


TransferKind = Literal["offload", "load", "store", "fetch", "send", "grow", "receive"]


class Transfer(msgspec.Struct, frozen=True, array_like=True):
    """Moves between tiers, or between engines, that end together. offload: from the device to the
    host's memory; load: back; store: from there to files; fetch: back; send: another engine takes
    a record from the host's memory; grow: it may take more of it now; receive: one comes there."""

    id: int
    kind: TransferKind
    moves: list[Move] = []
    files: list[FileMove] = []
    record: RecordMove | None = None


class TransferEnd(NamedTuple):
    """A transfer has ended. error: why a record did not come. bytes, seconds, pages: of a record
    that went to another engine or came from one."""

    id: int
    succeeded: bool
    error: str = ""
    bytes: int = 0
    seconds: float = 0.0
    pages: int = 0


class StepPlan(msgspec.Struct, frozen=True, tag="plan"):
    """What one step does, in this order: ends, admissions, grants, copies, forward, sampling,
    saves.

    ends: slots whose requests have ended; what they have is saved before the slots are used again.
    transfers: start behind that, and end later; no step names what they write before. deletes: keys
    of records whose files go, of their state, and of their pages if true.

    decode: slots that verify their drafts and emit at least one token. Rows run in the order
    decode, then chunks. context: an upper bound on any row's length after the step, in tokens.
    drafts: those that each decode row verifies, and that are made for each sampled row; -1: as
    many as the engine makes at most.
    """

    step: int
    admissions: list[Admission]
    grants: list[PageGrant]
    decode: list[int]
    chunks: list[Chunk]
    saves: list[Save]
    context: int
    ends: list[Save] = []
    copies: list[PageCopy] = []
    transfers: list[Transfer] = []
    deletes: list[tuple[str, bool]] = []
    drafts: int = -1

    @property
    def sampled_slots(self) -> list[int]:
        """Slots of the rows that are sampled: decode rows, then last chunks."""
        return self.decode + [chunk.slot for chunk in self.chunks if chunk.last]


class Masks(msgspec.Struct, frozen=True, tag="masks"):
    """The tokens that grammars allow in one step, one bit each, for the sampled rows `rows`.

    A decode row has width mask rows, one for each candidate; a final chunk has one. words: int32,
    little-endian, one mask row after the other, ceil(vocabulary / 32) words each.
    """

    step: int
    rows: list[int]
    words: bytes


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of a slot's prompt tokens from position `start` on."""

    slot: int
    start: int
    rows: list[TokenLogprobs]


class StepResult(msgspec.Struct, frozen=True, tag="result"):
    """The result of one step: for each sampled row its slot and its new tokens.

    Rows are in plan order: decode slots, then the chunks with `last` set. The last token of a
    row that ended is its stop token. logprobs: by row, if asked for. drafts: each row's
    drafts for the next step, in steps with masks. not_finite: rows that end because their logits
    were NaN or infinite. drafted: of each row, how many drafts it had, and the number of the
    method that made them, by `Limits.methods`; empty: as many as there can be, of the first one.
    """

    step: int
    slots: list[int]
    tokens: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = {}
    prompt_logprobs: list[PromptLogprobs] = []
    drafts: list[list[int]] = []
    not_finite: list[int] = []
    drafted: list[tuple[int, int]] = []


class StepTiming(msgspec.Struct, frozen=True, tag="timing", kw_only=True):
    """When a step of the plan log ran, and how large it was.

    planned, launched, ended, committed: seconds of one clock, when the plan was made, when the
    worker had been given it, when its result was there, and when the scheduler had taken it.
    planning: seconds that making the plan took. wall: from the launch, or from the end of the step
    before where that is later, to the end. The counts are those of vLLM's forward pass metrics,
    with their names. decode_tokens: tokens of decode rows, drafts among them; accepted_tokens: of
    what they brought.
    """

    step: int
    planned: float
    launched: float
    ended: float
    committed: float
    planning: float
    wall: float
    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    sum_prefill_kv_tokens: int = 0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0
    num_sampled: int = 0
    decode_tokens: int = 0
    accepted_tokens: int = 0


class StopRanks(msgspec.Struct, frozen=True, tag="stop"):
    """The ranks end their loop."""


ToRank = StepPlan | StopRanks
