"""Workloads: prompts and output lengths, drawn from a seed or read from a file.

Item i of a workload depends on the seed and on i alone. So each of n processes takes every nth
item: no two send the same one, and the workload is the same for every n. Prompts are token ids
where the endpoint takes them, so that no tokenizer is needed; a chat gets words. This module knows
no server and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np

from millrace.bench.flags.structs import RangeConvention
from millrace.errors import UserError

RANGE_MEANINGS: dict[RangeConvention, str] = {
    "vllm": "[L(1-r), L(1+r)]",
    "inferencex": "[L*r, L]",
}

# Frequent English words, each a single token in most vocabularies.
_VOCABULARY = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea kid body information back"
)
_WORDS = _VOCABULARY.split()

Content = str | list[Any]  # text, or token ids, or chat messages


class Turn(msgspec.Struct, frozen=True):
    """A later user turn of a conversation, and the output tokens of its answer."""

    text: str
    output_tokens: int


class Prompt(msgspec.Struct, frozen=True):
    """One request: its content (token ids, text or chat messages), the tokens (words) of that, the
    output tokens to generate, the turns that follow after the answer, and further fields of the
    request's body. fresh: permille of the input that no earlier request has, where that is known.
    """

    content: Content
    input_tokens: int
    output_tokens: int
    later_turns: tuple[Turn, ...] = ()
    extra: dict[str, Any] = {}
    fresh: int = 1000


class RandomSpec(msgspec.Struct, frozen=True, kw_only=True, tag="random"):
    """Random prompts of random lengths.

    count: None for a workload without end. range_ratio r has two meanings: "vllm" draws lengths
    from [L(1 - r), L(1 + r)], "inferencex" (and SGLang) from [L r, L]. prefix_len: tokens at the
    beginning that all prompts share, added to the length. context_len: tokens before each prompt,
    different for each, also added. turns: user turns of a conversation, each of such a length; more
    than 1 makes text instead of token ids.
    """

    count: int | None
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    convention: RangeConvention = "vllm"
    prefix_len: int = 0
    context_len: int = 0
    turns: int = 1
    vocab_size: int = 1000
    seed: int = 0


class PrefixSpec(msgspec.Struct, frozen=True, kw_only=True, tag="prefix_repetition"):
    """num_prefixes shared prefixes, each followed by a unique suffix; item i has prefix i modulo
    num_prefixes. Lengths in tokens (words)."""

    count: int | None
    prefix_len: int = 256
    suffix_len: int = 256
    num_prefixes: int = 10
    output_len: int = 128
    vocab_size: int = 1000
    seed: int = 0


class PolicySpec(msgspec.Struct, frozen=True, kw_only=True, tag="policy"):
    """Insurance policies and questions about them, those of `millrace eval`; text."""

    count: int | None
    output_len: int = 160
    vocab_size: int = 1000
    seed: int = 0


class FileSpec(msgspec.Struct, frozen=True, kw_only=True, tag="given"):
    """The prompts of a file, in its order; after the last one they begin again."""

    prompts: tuple[Prompt, ...]
    count: int | None
    vocab_size: int = 1000
    seed: int = 0
    source: str = "file"


class TraceRow(msgspec.Struct, frozen=True, array_like=True):
    """One request of a trace. blocks: ids of the blocks of its prompt; equal ids, equal tokens."""

    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class TraceSpec(msgspec.Struct, frozen=True, kw_only=True, tag="trace"):
    """Requests of the lengths in a trace, with random tokens, in its order.

    block_tokens: the size of a block. After the last row the rows begin again. streams: the first
    rows, beside which the others come in bursts (`workload.bursts`).
    """

    rows: tuple[TraceRow, ...]
    count: int | None
    block_tokens: int = 512
    vocab_size: int = 1000
    seed: int = 0
    source: str = "trace"
    streams: int = 0


class AgentSpec(msgspec.Struct, frozen=True, kw_only=True, tag="agent"):
    """Sessions of an agent; see `workload.agent`. Lengths are in words.

    turns: requests of a session, without auxiliary calls. tools: the share of turns that bring a
    tool's result, of tool_min to tool_max words. aux, branch: how likely each is before a turn, and
    compaction in a session. pause: mean seconds before a message of the user.
    """

    count: int | None
    turns: int = 12
    system_len: int = 1500
    user_len: int = 100
    output_len: int = 120
    tool_min: int = 200
    tool_max: int = 8000
    tools: float = 0.7
    aux: float = 0.25
    branch: float = 0.08
    compaction: float = 0.2
    pause: float = 5.0
    vocab_size: int = 1000
    seed: int = 0


Workload = RandomSpec | PrefixSpec | PolicySpec | FileSpec | TraceSpec | AgentSpec


def prompt_maker(spec: Workload, *, as_text: bool = False) -> Callable[[int], Prompt]:
    """The function that gives item i. as_text: words instead of token ids.

    Raises UserError for sizes that cannot be used.
    """
    check_spec(spec)
    if isinstance(spec, FileSpec):
        given = spec.prompts
        return lambda index: given[index % len(given)]
    if isinstance(spec, TraceSpec):
        return _trace_maker(spec, as_text)
    if isinstance(spec, PolicySpec):
        return _policy_maker(spec, as_text)
    if isinstance(spec, AgentSpec):
        from millrace.bench.workload.agent import agent_maker  # builds on this module

        return agent_maker(spec)
    if isinstance(spec, PrefixSpec):
        return _prefix_maker(spec, as_text)
    return _conversation_maker(spec) if spec.turns > 1 else _random_maker(spec, as_text)


def random_prompts(spec: RandomSpec, *, as_text: bool = False) -> list[Prompt]:
    """All prompts of a counted workload. Equal specs give equal prompts."""
    make = prompt_maker(spec, as_text=as_text)
    return [make(index) for index in range(spec.count or 0)]


# --- drawing -----------------------------------------------------------------------------------


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _draw(rng: np.random.Generator, length: int, vocabulary: int) -> list[int]:
    drawn: list[int] = rng.integers(0, vocabulary, length).tolist()
    return drawn


def _words(ids: Sequence[int]) -> str:
    return " ".join([_WORDS[i] for i in ids])


def words(rng: np.random.Generator, count: int) -> str:
    """So many random words."""
    return _words(_draw(rng, count, len(_WORDS)))


_SHARED = 1 << 40  # key of what several items share; no item has this number


def _random_maker(spec: RandomSpec, as_text: bool) -> Callable[[int], Prompt]:
    vocabulary = len(_WORDS) if as_text else spec.vocab_size
    prefix = _draw(_generator(spec.seed, _SHARED), spec.prefix_len, vocabulary)
    inputs = length_range(spec.input_len, spec.range_ratio, spec.convention)
    outputs = length_range(spec.output_len, spec.range_ratio, spec.convention)

    def make(index: int) -> Prompt:
        rng = _generator(spec.seed, index)
        length, output = (int(rng.integers(low, high + 1)) for low, high in (inputs, outputs))
        ids = prefix + _draw(rng, spec.context_len + length, vocabulary)
        return Prompt(_words(ids) if as_text else ids, len(ids), output)

    return make


def _conversation_maker(spec: RandomSpec) -> Callable[[int], Prompt]:
    """Every message is drawn as a random prompt is; the shared prefix opens the first one."""
    single = _random_maker(msgspec.structs.replace(spec, turns=1), as_text=True)
    plain = msgspec.structs.replace(spec, turns=1, prefix_len=0, context_len=0)

    def make(index: int) -> Prompt:
        first = single(index)
        later_turns = []
        for turn in range(1, spec.turns):
            seed = spec.seed + _SHARED + turn  # each turn has its own random stream
            drawn = _random_maker(msgspec.structs.replace(plain, seed=seed), as_text=True)(index)
            later_turns.append(Turn(str(drawn.content), drawn.output_tokens))
        return msgspec.structs.replace(first, later_turns=tuple(later_turns))

    return make


def _prefix_maker(spec: PrefixSpec, as_text: bool) -> Callable[[int], Prompt]:
    vocabulary = len(_WORDS) if as_text else spec.vocab_size
    prefixes = [
        _draw(_generator(spec.seed, _SHARED, number), spec.prefix_len, vocabulary)
        for number in range(spec.num_prefixes)
    ]

    def make(index: int) -> Prompt:
        suffix = _draw(_generator(spec.seed, index), spec.suffix_len, vocabulary)
        ids = prefixes[index % spec.num_prefixes] + suffix
        return Prompt(_words(ids) if as_text else ids, len(ids), spec.output_len)

    return make


def _trace_maker(spec: TraceSpec, as_text: bool) -> Callable[[int], Prompt]:
    vocabulary = len(_WORDS) if as_text else spec.vocab_size
    fresh = _fresh_shares(spec)

    def make(index: int) -> Prompt:
        row = spec.rows[index % len(spec.rows)]
        ids: list[int] = []
        for block in row.blocks:
            ids += _draw(_generator(spec.seed, 1, block), spec.block_tokens, vocabulary)
        rest = max(0, row.input_tokens - len(ids))
        ids = ids[: row.input_tokens] + _draw(_generator(spec.seed, 0, index), rest, vocabulary)
        content = _words(ids) if as_text else ids
        share = fresh[index] if index < len(fresh) else 1000 * rest // len(ids)
        return Prompt(content, len(ids), row.output_tokens, fresh=share)

    return make


def _fresh_shares(spec: TraceSpec) -> list[int]:
    """Permille of each row's tokens that lie in no block of an earlier row."""
    seen: set[int] = set()
    shares = []
    for row in spec.rows:
        known = 0
        for block in row.blocks:
            if block not in seen:
                break
            known += spec.block_tokens
        seen.update(row.blocks)
        shares.append(round(1000 * max(0, row.input_tokens - known) / row.input_tokens))
    return shares


def _policy_maker(spec: PolicySpec, as_text: bool) -> Callable[[int], Prompt]:
    from millrace.tasks import find_task

    task = find_task("policy")

    def make(index: int) -> Prompt:
        messages = [dict(m) for m in task.make(index, spec.seed, "heldout").messages]
        text = "\n\n".join(str(m["content"]) for m in messages)
        return Prompt(messages if as_text else text, len(text.split()), spec.output_len)

    return make


_OF_ONE_RUN = ("count", "seed", "vocab_size", "source")  # not of the kind of load


def workload_digest(spec: Workload) -> str:
    """What was asked for, as a short text: equal for repeats, which have seeds of their own.

    Settings at their defaults are not part of it, so a new setting changes no older digest.
    """
    settings = {
        field.name: value
        for field in msgspec.structs.fields(spec)
        if field.name not in _OF_ONE_RUN and (value := getattr(spec, field.name)) != field.default
    }
    said = msgspec.json.encode([spec.__struct_config__.tag, settings], order="sorted")
    return blake2b(said, digest_size=8).hexdigest()


# --- checks and descriptions -------------------------------------------------------------------


def length_range(length: int, ratio: float, convention: RangeConvention) -> tuple[int, int]:
    """The smallest and the largest length that is drawn, both at least 1.

    Raises UserError for a ratio that the convention does not define.
    """
    if convention == "vllm":
        if not 0 <= ratio < 1:
            raise UserError(
                f"--random-range-ratio {ratio}: use a number in [0, 1) with the vllm convention"
            )
        return max(1, math.floor(length * (1 - ratio))), max(1, math.ceil(length * (1 + ratio)))
    if not 0 < ratio <= 1:
        raise UserError(
            f"--random-range-ratio {ratio}: use a number in (0, 1] with the inferencex convention"
        )
    return max(1, math.floor(length * ratio)), max(1, length)


def check_spec(spec: Workload) -> None:
    """Raise UserError for sizes that cannot be used; the message names the flag."""
    positive: dict[str, int | None] = {"--num-prompts": spec.count}
    positive["--random-vocab-size"] = spec.vocab_size
    if isinstance(spec, RandomSpec):
        positive |= {"--random-input-len": spec.input_len, "--random-output-len": spec.output_len}
        positive["--multi-turn-turns"] = spec.turns
        if spec.prefix_len < 0:
            raise UserError(f"--random-prefix-len {spec.prefix_len}: use 0 or more")
        if spec.context_len < 0:
            raise UserError(f"--random-context-len {spec.context_len}: use 0 or more")
        length_range(spec.input_len, spec.range_ratio, spec.convention)
    elif isinstance(spec, PrefixSpec):
        positive |= {
            "--prefix-repetition-prefix-len": spec.prefix_len,
            "--prefix-repetition-suffix-len": spec.suffix_len,
            "--prefix-repetition-num-prefixes": spec.num_prefixes,
            "--prefix-repetition-output-len": spec.output_len,
        }
    elif isinstance(spec, PolicySpec):
        positive["--policy-output-len"] = spec.output_len
    elif isinstance(spec, AgentSpec):
        from millrace.bench.workload.agent import check_agent  # builds on this module

        check_agent(spec)
    for flag, value in positive.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: use 1 or more")


class Lengths(msgspec.Struct, frozen=True):
    """Realised lengths of prompts: their number; minimum, maximum and sum of each length."""

    count: int = 0
    min_input: int = 0
    max_input: int = 0
    inputs: int = 0
    min_output: int = 0
    max_output: int = 0
    outputs: int = 0
    words: bool = False

    @property
    def mean_input(self) -> float:
        return self.inputs / self.count if self.count else 0.0

    @property
    def mean_output(self) -> float:
        return self.outputs / self.count if self.count else 0.0


def lengths(prompts: Sequence[Prompt]) -> Lengths:
    """The realised lengths of prompts; of a conversation, those of its first turn."""
    if not prompts:
        return Lengths()
    inputs = [p.input_tokens for p in prompts]
    outputs = [p.output_tokens for p in prompts]
    words = not (isinstance(prompts[0].content, list) and isinstance(prompts[0].content[0], int))
    return Lengths(
        *(len(prompts), min(inputs), max(inputs), sum(inputs)),
        *(min(outputs), max(outputs), sum(outputs), words),
    )


def merge_lengths(parts: Sequence[Lengths]) -> Lengths:
    """The lengths of a workload from those of its parts."""
    filled = [part for part in parts if part.count]
    if not filled:
        return Lengths()
    return Lengths(
        count=sum(p.count for p in filled),
        min_input=min(p.min_input for p in filled),
        max_input=max(p.max_input for p in filled),
        inputs=sum(p.inputs for p in filled),
        min_output=min(p.min_output for p in filled),
        max_output=max(p.max_output for p in filled),
        outputs=sum(p.outputs for p in filled),
        words=filled[0].words,
    )


def workload_line(spec: Workload, seen: Lengths) -> str:
    """One line: the kind of workload, the meaning of its range ratio, the realised lengths."""
    unit = "words" if seen.words else "tokens"
    return (
        f"{seen.count} {_kind(spec)}: "
        f"input {seen.min_input}..{seen.max_input}, mean {seen.mean_input:.1f} {unit}; "
        f"output {seen.min_output}..{seen.max_output}, mean {seen.mean_output:.1f} tokens"
    )


def _kind(spec: Workload) -> str:
    if isinstance(spec, FileSpec):
        return f"prompts of {spec.source}"
    if isinstance(spec, TraceSpec):
        return f"requests of {spec.source}"
    if isinstance(spec, PolicySpec):
        return "questions about policies"
    if isinstance(spec, AgentSpec):
        return f"sessions of {spec.turns} turns"
    if isinstance(spec, PrefixSpec):
        return f"prompts on {spec.num_prefixes} prefixes of {spec.prefix_len}"
    kind = "random prompts" if spec.turns == 1 else f"conversations of {spec.turns} turns"
    meaning = RANGE_MEANINGS[spec.convention]
    return f"{kind}, range ratio {spec.range_ratio:g} as {spec.convention} {meaning}"
