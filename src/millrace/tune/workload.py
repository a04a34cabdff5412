"""Lengths of a workload's sequences, which decide what a server must be able to hold."""

from __future__ import annotations

from millrace.bench.load.options import BenchOptions
from millrace.bench.workload.prompts import lengths, prompt_maker

_SEEN = 512  # prompts that are looked at
_OF_A_WORD = 2  # tokens of a word, at most: plain English has 1.3, the rules of a policy 1.5


def longest_sequence(load: BenchOptions) -> int:
    """Tokens of the longest prompt and its answers, of the first prompts of the workload. Where its
    texts are counted in words alone, more than their tokens can be expected to be."""
    make = prompt_maker(load.workload, as_text=load.as_text)
    prompts = [make(at) for at in range(min(load.workload.count or _SEEN, _SEEN))]
    turns = [
        sum(len(turn.text.split()) + turn.output_tokens for turn in prompt.later_turns)
        for prompt in prompts
    ]
    each = _OF_A_WORD if prompts and lengths(prompts[:1]).words else 1
    pairs = zip(prompts, turns, strict=True)
    return max((each * (p.input_tokens + more) + p.output_tokens for p, more in pairs), default=0)


def mean_lengths(load: BenchOptions) -> tuple[float, float]:
    """Mean tokens of prompts and answers, of the first ones."""
    make = prompt_maker(load.workload, as_text=load.as_text)
    found = lengths([make(at) for at in range(min(load.workload.count or _SEEN, _SEEN))])
    return found.mean_input, found.mean_output
