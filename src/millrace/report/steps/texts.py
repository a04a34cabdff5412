"""Prompts by kind of text, because a model's drafts are accepted more often in some than in others.

Four kinds: code to write, prose to write, fields to extract from a document, small talk with
questions. Prompts are drawn from a seed; item i of a kind depends on the seed and i alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from millrace.report.steps.journal import write_whole
from millrace.tasks import find_task
from millrace.tasks.items import rng_for

KINDS = ("code", "prose", "extraction", "chat")
_LANGUAGES = ("Python", "C++", "Rust", "TypeScript", "SQL", "Go", "Java", "Bash")
_PROGRAMS = (
    "merges two sorted lists without copying either",
    "reads a CSV file and prints the mean of each column",
    "finds the longest run of equal values",
    "keeps the k largest of a stream of numbers",
    "parses a date in the form 2026-03-01, and says what is wrong with a bad one",
    "counts how often each word occurs in a text, and lists the ten most frequent",
    "removes duplicates and keeps the first of each",
    "retries a function with growing waits, up to a limit",
    "turns Roman numerals into numbers",
    "walks a tree of folders and sums the sizes of all files",
    "limits how often something is called in a second",
    "compares two versions such as 1.10.2 and 1.9",
)
_FORMS = ("Write a function in {} that {}.", "In {}, write a program that {}. Add two tests.")
_SCENES = (
    "a harbour in the early morning", "the last bus of the day", "a house that is being sold",
    "two people who repair a clock", "a village shop in winter", "a long drive through flat land",
    "a teacher's first lesson", "an attic full of letters", "the day after a storm",
    "a kitchen before a wedding", "a walk along a canal", "a night shift in a hospital",
)  # fmt: skip
_PROSE = (
    "Write three paragraphs about {}.", "Begin a story with {}; write about 200 words.",
    "Describe {} so that one can hear and smell it.", "Write a letter that tells of {}.",
)  # fmt: skip
_QUESTIONS = (
    "What should I think of before I move to a city?", "How do I politely refuse an invitation?",
    "My plants have yellow leaves. What could it be?", "Can you explain compound interest to me?",
    "What is the difference between weather and climate?", "Plan a week in the mountains for me.",
    "I sleep badly. What do people usually try?", "Why do we have leap years?",
    "Give me an idea for dinner with lentils.", "How do I prepare for a job interview?",
    "What does an insurance deductible mean?", "Is it worth repairing an old washing machine?",
)  # fmt: skip


def messages(kind: str, index: int, seed: int = 0) -> list[dict[str, Any]]:
    """The messages of one prompt of a kind."""
    if kind == "extraction":
        return [
            dict(message) for message in find_task("policy").make(index, seed, "heldout").messages
        ]
    rng = rng_for(f"report {kind}", "heldout", seed, index)
    if kind == "code":
        text = rng.choice(_FORMS).format(rng.choice(_LANGUAGES), rng.choice(_PROGRAMS))
    elif kind == "prose":
        text = rng.choice(_PROSE).format(rng.choice(_SCENES))
    else:
        text = rng.choice(_QUESTIONS)
    # Two prompts that are the same would measure the prefix cache; a name makes them differ.
    number = f"[{kind} {seed}-{index}] "
    return [{"role": "user", "content": number + text}]


def mixed(count: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Prompts of all kinds, one after the other."""
    return [messages(KINDS[i % len(KINDS)], i // len(KINDS), seed) for i in range(count)]


def write_prompts(path: Path, prompts: list[list[dict[str, Any]]], output: int) -> Path:
    """A file for `--dataset-name custom`, with at most `output` tokens an answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fixed = {"output_tokens": output, "chat_template_kwargs": {"enable_thinking": False}}
    rows = [msgspec.json.encode({"messages": one, **fixed}) for one in prompts]
    return write_whole(path, b"\n".join(rows) + b"\n")
