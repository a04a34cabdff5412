"""What requests may ask of their tokens, against a greedy loop over whole prefixes.

Each is run plain, with drafts (three in four of them right, so that verified positions must see the
drafts before them) and pipelined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer
from torch import Tensor

from millrace.engine import plan_log
from millrace.engine.engine import Engine
from millrace.protocol import AddRequest, Delta, Grammar, ReasoningBound, SamplingParams
from millrace.runtime.step import logits_processors as processors
from tests.support.engines import build, draft_well, watch_logits

AT_ONCE = 3  # candidates, so that rules meet them in parts
PROMPTS = [[5, 9, 40, 77, 120, 6, 9, 9], [3, 4]]
LENGTH = 20
RUNS = [
    pytest.param({}, id="plain"),
    pytest.param({"speculative_config": {"num_speculative_tokens": 3}}, id="mtp-3"),
    pytest.param(
        {"speculative_config": {"num_speculative_tokens": 1}, "async_scheduling": True},
        id="mtp-1-pipelined",
    ),
]

Rule = Callable[[Tensor, list[int], int], Tensor]  # logits, context, prompt length -> logits


class Oracle:
    """The model's logits after any context, each from a cold prefill, and greedy loops on them."""

    def __init__(self, model: Path) -> None:
        self._engine = build(model)
        self._seen = watch_logits(self._engine)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def logits(self, context: list[int]) -> Tensor:
        key = tuple(context)
        if key not in self._known:
            add(self._engine, "x", context, max_tokens=1)
            finish(self._engine)
            self._known[key] = self._seen[-1][0].float()
        return self._known[key]

    def greedy(self, prompt: list[int], rule: Rule) -> list[int]:
        context = list(prompt)
        for _ in range(LENGTH):
            context.append(int(rule(self.logits(context), context, len(prompt)).argmax()))
        return context[len(prompt) :]

    def close(self) -> None:
        self._engine.close()


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Iterator[Oracle]:
    oracle = Oracle(tiny_model)
    yield oracle
    oracle.close()


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "AT_ONCE", AT_ONCE)


def add(engine: Engine, name: str, prompt: list[int], **given: Any) -> None:
    """A greedy request; fields of AddRequest and of SamplingParams together."""
    of_request = {k: given.pop(k) for k in list(given) if k in AddRequest.__struct_fields__}
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": LENGTH, **given}
    engine.add(AddRequest(name, prompt, SamplingParams(**params), **of_request))


def finish(engine: Engine) -> dict[str, list[Delta]]:
    """Step until idle; every request's deltas."""
    found: dict[str, list[Delta]] = {}
    while engine.has_work():
        for delta in engine.step():
            found.setdefault(delta.id, []).append(delta)
    return found


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def penalties(repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0) -> Rule:
    def rule(logits: Tensor, context: list[int], prompt_len: int) -> Tensor:
        out = logits.clone()
        for token in set(context):
            out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
        for token in set(context[prompt_len:]):
            out[token] -= presence + frequency * context[prompt_len:].count(token)
        return out

    return rule


def plus(terms: dict[int, float]) -> Rule:
    def rule(logits: Tensor, context: list[int], prompt_len: int) -> Tensor:
        out = logits.clone()
        for token, bias in terms.items():
            out[token] += bias
        return out

    return rule


def only(tokens: list[int]) -> Rule:
    def rule(logits: Tensor, context: list[int], prompt_len: int) -> Tensor:
        out = torch.full_like(logits, -torch.inf)
        out[tokens] = logits[tokens]
        return out

    return rule


def closed_after(budget: int, end: int) -> Rule:
    """`end` and nothing else, if it has not come before `budget` tokens were generated."""

    def rule(logits: Tensor, context: list[int], prompt_len: int) -> Tensor:
        generated = context[prompt_len:]
        due = len(generated) >= budget and end not in generated
        return only([end])(logits, context, prompt_len) if due else logits

    return rule


def unlike(first: list[int]) -> Rule:
    """Neither first[2] anywhere nor first[5], first[6] in a row."""

    def rule(logits: Tensor, context: list[int], prompt_len: int) -> Tensor:
        out = logits.clone()
        out[first[2]] = -torch.inf
        if context[-1] == first[5]:
            out[first[6]] = -torch.inf
        return out

    return rule


def check(
    model: Path, oracle: Oracle, rule: Rule, options: dict[str, Any], **processors: Any
) -> dict[str, list[Delta]]:
    """The engine's tokens under `processors` are the loop's under `rule`, beside a plain one."""
    expected = [oracle.greedy(prompt, rule) for prompt in PROMPTS]
    plain = oracle.greedy(PROMPTS[0], lambda logits, *_: logits)
    engine = build(model, **options)
    if "speculative_config" in options and not options.get("async_scheduling"):
        draft_well(engine, [[*p, *e] for p, e in zip(PROMPTS, expected, strict=True)])
    for index, prompt in enumerate(PROMPTS):
        add(engine, str(index), prompt, **processors)
    add(engine, "plain", PROMPTS[0])
    found = finish(engine)
    stats = engine.stats()
    engine.close()
    assert [tokens_of(found[str(i)]) for i in range(len(PROMPTS))] == expected
    assert tokens_of(found["plain"]) == plain
    if "speculative_config" in options and not options.get("async_scheduling"):
        assert stats.accepted_per_position[-1] > 2, "too few drafts stood to show anything"
    return found


@pytest.mark.parametrize("options", RUNS)
@pytest.mark.parametrize(
    ("rule", "processors"),
    [
        (penalties(repetition=1.4), {"repetition_penalty": 1.4}),
        (
            penalties(presence=1.5, frequency=0.7),
            {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        ),
        (plus({7: 4.0, 30: 3.5, 31: -9.0}), {"logit_bias": {7: 4.0, 30: 3.5, 31: -9.0}}),
        (only([3, 50, 64, 319]), {"allowed_token_ids": [3, 50, 64, 319]}),
    ],
    ids=["repetition", "presence-frequency", "bias", "allowed"],
)
def test_rules(
    tiny_model: Path,
    oracle: Oracle,
    rule: Rule,
    processors: dict[str, Any],
    options: dict[str, Any],
) -> None:
    check(tiny_model, oracle, rule, options, **processors)


@pytest.mark.parametrize("options", RUNS)
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_reasoning_is_closed_when_its_budget_is_spent(
    tiny_model: Path, oracle: Oracle, options: dict[str, Any], budget: int
) -> None:
    """Drafts count, a token of the prompt does not, and once closed it is closed."""
    end = PROMPTS[0][1]
    found = check(
        tiny_model,
        oracle,
        closed_after(budget, end),
        options,
        reasoning=ReasoningBound(budget, end),
    )
    for index in range(len(PROMPTS)):
        assert end in tokens_of(found[str(index)])[: budget + 1]


def test_no_rule_takes_many_rows_at_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each needs several times the memory of the logits that it is given."""
    sizes: dict[str, set[int]] = {}

    def noted(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
        def run(logits: Tensor, *rest: Any) -> Any:
            sizes.setdefault(name, set()).add(len(logits))
            return rule(logits, *rest)

        return run

    names = {"apply_penalties", "apply_min_p", "apply_masks", "token_logprobs"}
    for name in names:
        monkeypatch.setattr(processors, name, noted(name, getattr(processors, name)))
    engine = build(tiny_model, speculative_config={"num_speculative_tokens": 3})
    for number in range(2):
        add(
            engine, str(number), PROMPTS[number], presence_penalty=0.5, min_p=0.1, logprobs=2,
            temperature=1.0, allowed_token_ids=[3, 4, 5], max_tokens=6,
        )  # fmt: skip
    finish(engine)
    engine.close()
    assert sizes.keys() == names
    assert {max(found) for found in sizes.values()} == {AT_ONCE}


@pytest.mark.parametrize("options", RUNS)
def test_bad_words(tiny_model: Path, oracle: Oracle, options: dict[str, Any]) -> None:
    first = oracle.greedy(PROMPTS[0], lambda logits, *_: logits)
    words = [[first[2]], [first[5], first[6]]]
    check(tiny_model, oracle, unlike(first), options, bad_words=words)


@pytest.mark.parametrize("options", RUNS)
def test_min_tokens_holds_every_end_back(
    tiny_model: Path, oracle: Oracle, options: dict[str, Any]
) -> None:
    """The token that greedy would give first is a stop token: banned at first, then the end."""
    stop = oracle.greedy(PROMPTS[0], lambda logits, *_: logits)[0]
    engine = build(tiny_model, **options)
    add(engine, "a", PROMPTS[0], stop_token_ids=[stop], min_tokens=5, logit_bias={stop: 50.0})
    add(engine, "b", PROMPTS[0], stop_token_ids=[stop])
    found = finish(engine)
    engine.close()
    assert tokens_of(found["b"]) == [stop]
    tokens = tokens_of(found["a"])
    assert len(tokens) == 6
    assert tokens[-1] == stop
    assert stop not in tokens[:-1]
    assert found["a"][-1].finish_reason == "stop"


@pytest.mark.parametrize("options", RUNS)
def test_logprobs(tiny_model: Path, oracle: Oracle, options: dict[str, Any]) -> None:
    """Of the model's own distribution, whatever rule applies; also of a prompt in chunks."""
    engine = build(
        tiny_model, **{**options, "max_num_batched_tokens": 16, "enable_prefix_caching": True}
    )
    prompt = [(7 * i) % 300 for i in range(50)]
    add(engine, "warm", prompt, max_tokens=1)
    finish(engine)
    add(engine, "a", prompt, logprobs=3, prompt_logprobs=2, presence_penalty=1.0)
    add(engine, "b", PROMPTS[1], logprobs=0)
    add(engine, "c", PROMPTS[1])
    found = finish(engine)
    engine.close()
    sequence = prompt + tokens_of(found["a"])
    lines = [line for delta in found["a"] for line in delta.logprobs or []]
    beside = [line for delta in found["b"] for line in delta.logprobs or []]
    assert [len(line.token_ids) for line in beside] == [1] * LENGTH, "not those of another request"
    first = found["a"][0].prompt_logprobs
    assert first is not None
    assert len(first) == len(prompt) - 1
    assert len(lines) == LENGTH
    for position, line in enumerate(first + lines, start=1):
        want = torch.log_softmax(oracle.logits(sequence[:position]), 0)
        top = 2 if position < len(prompt) else 3
        assert line.token_ids[0] == sequence[position]
        assert line.token_ids[1:] == want.topk(top).indices.tolist()
        got = torch.tensor(line.logprobs)
        assert torch.allclose(got, want[line.token_ids], atol=2e-4)
        assert line.rank == int((want > want[sequence[position]]).sum()) + 1
    assert all(d.logprobs is None for d in found["c"])


@pytest.mark.parametrize("options", RUNS)
def test_min_p_of_one_is_greedy(tiny_model: Path, oracle: Oracle, options: dict[str, Any]) -> None:
    expected = oracle.greedy(PROMPTS[0], lambda logits, *_: logits)
    engine = build(tiny_model, **options)
    add(engine, "a", PROMPTS[0], temperature=1.5, min_p=1.0, seed=4)
    add(engine, "b", PROMPTS[0], temperature=1.5, seed=4)
    found = finish(engine)
    engine.close()
    assert tokens_of(found["a"]) == expected
    assert tokens_of(found["b"]) != expected


@pytest.mark.parametrize("options", RUNS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_resumed_requests_go_on_as_if_they_had_never_stopped(
    tiny_model: Path, options: dict[str, Any], temperature: float
) -> None:
    processors = {
        "temperature": temperature,
        "seed": 9,
        "repetition_penalty": 1.2,
        "presence_penalty": 1.0,
        "min_tokens": 12,
    }
    engine = build(tiny_model, **options, enable_prefix_caching=True)
    add(engine, "whole", PROMPTS[0], **processors)
    whole = tokens_of(finish(engine)["whole"])
    for cut in (1, 7, LENGTH - 1, LENGTH):
        add(engine, f"cut{cut}", PROMPTS[0], resume=whole[:cut], **processors)
    found = finish(engine)
    engine.close()
    for cut in (1, 7, LENGTH - 1, LENGTH):
        deltas = found[f"cut{cut}"]
        assert tokens_of(deltas) == whole[cut:]
        assert deltas[-1].finish_reason == "length"


# --- grammars ----------------------------------------------------------------------------------


def regex(pattern: str, after: int | None = None) -> Grammar:
    return Grammar(LLMatcher.grammar_from_regex(pattern), after)


PATTERN = r"(yes|no|perhaps), [0-9]{2,5}( and [a-f]{1,6}){1,3}\."


@pytest.mark.parametrize("options", RUNS)
def test_grammars(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """A random model under a grammar writes what matches it, and the same however it is run."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    log = tmp_path / "log"
    engine = build(tiny_model, plan_log=str(log), **options)
    for seed in range(4):
        add(
            engine, str(seed), PROMPTS[seed % 2], grammar=regex(PATTERN), temperature=1.0,
            seed=seed, max_tokens=60, ignore_eos=seed == 3,
        )  # fmt: skip
    add(engine, "plain", PROMPTS[0])
    found = finish(engine)
    engine.close()
    plain = build(tiny_model)
    for seed in range(4):
        add(
            plain, str(seed), PROMPTS[seed % 2], grammar=regex(PATTERN), temperature=1.0,
            seed=seed, max_tokens=60,
        )  # fmt: skip
    alone = finish(plain)
    for seed in range(4):
        text = tokenizer.decode(tokens_of(found[str(seed)]))
        assert re.fullmatch(PATTERN, text), text
        assert found[str(seed)][-1].finish_reason == "stop"
        assert tokens_of(found[str(seed)]) == tokens_of(alone[str(seed)])
    assert len(tokens_of(found["plain"])) == LENGTH
    plain.close()
    fresh = build(tiny_model, **options)
    assert plan_log.replay(log, fresh.worker) == []
    fresh.close()


@pytest.mark.parametrize("options", RUNS)
def test_a_grammar_may_start_behind_a_token(tiny_model: Path, options: dict[str, Any]) -> None:
    """As behind the end of the reasoning: before it anything goes."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    bias = {44: 6.0}
    engine = build(tiny_model, **options)
    for seed in range(4):
        grammar = regex("(ab|cd){2}", after=44)
        add(
            engine, str(seed), PROMPTS[0], grammar=grammar, temperature=1.0, seed=seed,
            max_tokens=100, logit_bias=bias,
        )  # fmt: skip
    found = finish(engine)
    engine.close()
    for deltas in found.values():
        tokens = tokens_of(deltas)
        assert 44 in tokens[:-1]
        text = tokenizer.decode(tokens[tokens.index(44) + 1 :])
        assert re.fullmatch("(ab|cd){2}", text), text


@pytest.mark.parametrize("options", RUNS)
def test_a_grammar_starts_behind_reasoning_that_was_closed(
    tiny_model: Path, options: dict[str, Any]
) -> None:
    """Whole, and gone on with from before, at and behind the token that was forced."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    engine = build(tiny_model, **options)
    processors: dict[str, Any] = {
        "grammar": regex("(ab|cd){2}", after=44), "reasoning": ReasoningBound(5, 44),
        "temperature": 1.0, "seed": 2, "max_tokens": 40, "logit_bias": {44: -100.0}, "logprobs": 1,
    }  # fmt: skip
    add(engine, "whole", PROMPTS[0], **processors)
    whole = tokens_of(finish(engine)["whole"])
    assert whole.index(44) == 5
    assert re.fullmatch("(ab|cd){2}", tokenizer.decode(whole[6:])), whole
    cuts = range(1, len(whole))
    for cut in cuts:
        add(engine, str(cut), PROMPTS[0], resume=whole[:cut], **processors)
    found = finish(engine)
    engine.close()
    for cut in cuts:
        assert tokens_of(found[str(cut)]) == whole[cut:]


def test_a_resumed_grammar_goes_on(tiny_model: Path) -> None:
    engine = build(tiny_model, speculative_config={"num_speculative_tokens": 2})
    processors: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 60}
    add(engine, "whole", PROMPTS[0], grammar=regex(PATTERN), **processors)
    whole = tokens_of(finish(engine)["whole"])
    for cut in (1, 5, len(whole) - 1):
        add(engine, str(cut), PROMPTS[0], grammar=regex(PATTERN), resume=whole[:cut], **processors)
    found = finish(engine)
    for cut in (1, 5, len(whole) - 1):
        assert tokens_of(found[str(cut)]) == whole[cut:]
    add(engine, "odd", PROMPTS[0], grammar=regex("a+"), resume=[1, 2, 3], **processors)
    add(engine, "bad", PROMPTS[0], grammar=Grammar("start: ((("), **processors)
    add(engine, "gone", PROMPTS[0], grammar=regex("a+"), **processors)
    engine.abort(["gone"])
    found = finish(engine)
    assert found["odd"][-1].finish_reason == "error"
    assert "resume_token_ids" in str(found["odd"])
    assert found["bad"][-1].finish_reason == "error"
    assert "grammar" in str(found["bad"][-1].error)
    assert "gone" not in found
    assert engine.grammars is not None
    assert not engine.grammars.states
    engine.close()
