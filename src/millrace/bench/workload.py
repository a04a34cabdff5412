"""What is asked: prompts and output lengths, drawn from a seed.

A workload is a list of `Prompt`s. Token ids are used where the endpoint takes them, so that no
tokenizer is needed; a chat gets words. This module knows no server and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from millrace.errors import UserError

RangeConvention = Literal["vllm", "inferencex"]
DATASETS = ("random",)

# Frequent English words, each a single token in most vocabularies.
_VOCABULARY = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea kid body information back"
)
_WORDS = _VOCABULARY.split()


class Prompt(msgspec.Struct, frozen=True):
    """One request's content: token ids or text, how many tokens (words) that is, and how many to
    ask for."""

    content: list[int] | str
    input_tokens: int
    output_tokens: int


class RandomSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Random prompts of random lengths.

    range_ratio r has two meanings: "vllm" draws lengths from [L(1 - r), L(1 + r)], "inferencex"
    (and SGLang) from [L r, L]. prefix_len: tokens that all prompts begin with, besides their own.
    """

    count: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    convention: RangeConvention = "vllm"
    prefix_len: int = 0
    vocab_size: int = 1000
    seed: int = 0


def length_range(length: int, ratio: float, convention: RangeConvention) -> tuple[int, int]:
    """The smallest and the largest length that is drawn, both at least 1.

    Raises UserError when the ratio has no meaning under the convention.
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


def random_prompts(spec: RandomSpec, *, as_text: bool = False) -> list[Prompt]:
    """`spec.count` prompts of token ids in [0, vocab_size), or of words. Equal specs give equal
    prompts. Raises UserError for sizes that cannot be drawn."""
    check_spec(spec)
    rng = np.random.default_rng(spec.seed)
    inputs = _lengths(rng, spec.input_len, spec)
    outputs = _lengths(rng, spec.output_len, spec)
    source = len(_WORDS) if as_text else spec.vocab_size
    prefix = rng.integers(0, source, spec.prefix_len)
    prompts = []
    for length, output in zip(inputs, outputs, strict=True):
        ids = np.concatenate([prefix, rng.integers(0, source, length)]).tolist()
        content = " ".join(_WORDS[i] for i in ids) if as_text else ids
        prompts.append(Prompt(content, len(ids), output))
    return prompts


def _lengths(rng: np.random.Generator, length: int, spec: RandomSpec) -> list[int]:
    low, high = length_range(length, spec.range_ratio, spec.convention)
    drawn: list[int] = rng.integers(low, high + 1, spec.count).tolist()
    return drawn


def check_spec(spec: RandomSpec) -> None:
    """Raise UserError for sizes that cannot be drawn, by the name of their flag."""
    sizes = {
        "--num-prompts": spec.count,
        "--random-input-len": spec.input_len,
        "--random-output-len": spec.output_len,
        "--random-vocab-size": spec.vocab_size,
    }
    for flag, value in sizes.items():
        if value < 1:
            raise UserError(f"{flag} {value}: use 1 or more")
    if spec.prefix_len < 0:
        raise UserError(f"--random-prefix-len {spec.prefix_len}: use 0 or more")
    length_range(spec.input_len, spec.range_ratio, spec.convention)


def workload_line(spec: RandomSpec, prompts: Sequence[Prompt]) -> str:
    """What the workload really is: the meaning of the ratio, the ranges, the realised means."""
    inputs = [p.input_tokens for p in prompts]
    outputs = [p.output_tokens for p in prompts]
    unit = "words" if isinstance(prompts[0].content, str) else "tokens"
    return (
        f"{len(prompts)} random prompts, range ratio {spec.range_ratio:g} as {spec.convention}: "
        f"input {min(inputs)}..{max(inputs)}, mean {sum(inputs) / len(inputs):.1f} {unit}; "
        f"output {min(outputs)}..{max(outputs)}, mean {sum(outputs) / len(outputs):.1f} tokens"
    )
