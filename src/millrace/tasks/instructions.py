"""The task `instructions`: a request for a short text, with one to three rules on its form.

Every rule can be checked by a program: how many words, lines or items, which words, which case,
how it begins and ends. The reference answer is the list of rules; a text is right when it keeps all
of them. What the text says is not graded.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from millrace.tasks.items import Grade, Item, Split, Task, is_heldout, rng_for, visible

Rule = Mapping[str, Any]  # its kind, and the numbers and words in it

_TOPICS = (
    "how a lighthouse works", "why bread rises", "the first day at a new job", "a walk in the rain",
    "what a librarian does", "how to repair a bicycle tyre", "a market on a Saturday morning",
    "why the sea is salty", "a train that is late", "how to keep bees", "the smell of a workshop",
    "what makes a good map", "a garden in March", "how to choose a coat", "an old radio",
    "the life of a river", "how clocks were set before radio", "a quarrel between two neighbours",
    "what happens in a bakery at night", "how to learn a song by ear", "a lost umbrella",
    "why bridges have joints", "a power cut in winter", "how to read a contract",
)  # fmt: skip
_ASK = (
    "Write a short text about {}.", "Tell me something about {}.", "Please write about {}.",
    "I need a few lines about {}.", "Describe {} for a newspaper.",
)  # fmt: skip
_WORDS = (
    *("window", "copper", "patience", "seldom", "harbour", "ladder", "market", "winter"),
    *("therefore", "pencil", "yellow", "distance", "almost", "garden", "evening", "signal"),
)
_ENDINGS = ("That is all.", "Thank you for reading.", "More tomorrow.", "The rest is silence.")
_OPENINGS = ("To begin with,", "Once upon a time", "In short:", "Dear reader,")


# --- reading a text ----------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes, as they are written."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)


def lines(text: str) -> list[str]:
    """Lines that are not empty."""
    return [line for line in text.splitlines() if line.strip()]


def paragraphs(text: str) -> list[str]:
    """What empty lines separate."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def _count(text: str, word: str) -> int:
    return sum(one.lower() == word for one in words(text))


def _is_json_list(text: str, count: int) -> bool:
    body = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return isinstance(found, list) and len(found) == count and all(map(_is_text, found))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


# --- the rules ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """A sort of rule. group: at most one rule of a group is in an item, because two could exclude
    each other. says: wordings; draw: its numbers and words; keeps: whether a text keeps it."""

    group: str
    says: tuple[str, ...]
    draw: Callable[[random.Random], dict[str, Any]]
    keeps: Callable[[str, Rule], bool]


def _number(low: int, high: int, step: int = 1) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: {"n": rng.randrange(low, high + 1, step)}


def _one_of(choices: tuple[str, ...]) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: {"word": rng.choice(choices)}


def _repeated(rng: random.Random) -> dict[str, Any]:
    return {"word": rng.choice(_WORDS), "n": rng.randint(2, 4)}


def _nothing(rng: random.Random) -> dict[str, Any]:
    return {}


_KINDS: Mapping[str, _Kind] = {
    "at_most_words": _Kind(
        "length", ("Use at most {n} words.", "Do not write more than {n} words."),
        _number(30, 80, 10), lambda text, rule: 0 < len(words(text)) <= rule["n"],
    ),
    "at_least_words": _Kind(
        "length", ("Use at least {n} words.", "Write {n} words or more."),
        _number(40, 100, 10), lambda text, rule: len(words(text)) >= rule["n"],
    ),
    "bullets": _Kind(
        "form", ("Answer with exactly {n} lines that each begin with \"- \", and nothing else.",
                 "Give exactly {n} bullet points, each on a line of its own behind \"- \"; "
                 "no other lines."),
        _number(3, 6),
        lambda text, rule: len(lines(text)) == rule["n"]
        and all(line.startswith("- ") for line in lines(text)),
    ),
    "paragraphs": _Kind(
        "form", ("Write exactly {n} paragraphs, with an empty line between them.",
                 "The text has {n} paragraphs; separate them by empty lines."),
        _number(2, 4), lambda text, rule: len(paragraphs(text)) == rule["n"],
    ),
    "json_list": _Kind(
        "form", ("Answer with a JSON list of exactly {n} strings and nothing else.",),
        _number(2, 5), lambda text, rule: _is_json_list(text, rule["n"]),
    ),
    "with_word": _Kind(
        "word", ("Use the word \"{word}\".", "The word \"{word}\" has to be in it."),
        _one_of(_WORDS), lambda text, rule: _count(text, rule["word"]) > 0,
    ),
    "word_times": _Kind(
        "word", ("Use the word \"{word}\" exactly {n} times.",),
        _repeated, lambda text, rule: _count(text, rule["word"]) == rule["n"],
    ),
    "without_letter": _Kind(
        "letter", ("Use no word with the letter \"{word}\".", "Avoid the letter \"{word}\"."),
        _one_of(("z", "q", "x", "j")),
        lambda text, rule: bool(text.strip()) and rule["word"] not in text.lower(),
    ),
    "no_comma": _Kind(
        "mark", ("Use no commas.", "There must be no comma in your answer."),
        _nothing, lambda text, rule: bool(text.strip()) and "," not in text,
    ),
    "question_mark": _Kind(
        "mark", ("Ask exactly {n} questions: use {n} question marks.",),
        _number(2, 4), lambda text, rule: text.count("?") == rule["n"],
    ),
    "lower_case": _Kind(
        "case", ("Write everything in lower case.", "Use no capital letters."),
        _nothing, lambda text, rule: bool(words(text)) and text == text.lower(),
    ),
    "upper_case": _Kind(
        "case", ("Write everything in capital letters.",),
        _nothing, lambda text, rule: bool(words(text)) and text == text.upper(),
    ),
    "ends_with": _Kind(
        "case", ("End with the sentence \"{word}\" and write nothing behind it.",),
        _one_of(_ENDINGS), lambda text, rule: text.rstrip().endswith(rule["word"]),
    ),
    "begins_with": _Kind(
        "begin", ("Begin your answer with \"{word}\".",),
        _one_of(_OPENINGS), lambda text, rule: text.lstrip().startswith(rule["word"]),
    ),
    "title": _Kind(
        "begin", ("Put a title in double square brackets, as in [[Title]], on the first line.",),
        _nothing,
        lambda text, rule: bool(re.fullmatch(r"\s*\[\[[^\[\]\n]+\]\]\s*", text.split("\n")[0])),
    ),
}  # fmt: skip
# Lines and JSON leave room for rules on words and letters alone.
_FORMS = {"bullets", "json_list"}
_BESIDE_FORMS = {"word", "letter"}
# Openings have a capital letter, and most of them a comma.
_EXCLUDE = {"begins_with": {"lower_case", "upper_case", "no_comma"}}


def keeps(rule: Rule, text: str) -> bool:
    """Whether a text keeps a rule."""
    return _KINDS[rule["kind"]].keeps(text, rule)


def wording(rule: Rule, rng: random.Random) -> str:
    """A rule as a sentence."""
    return rng.choice(_KINDS[rule["kind"]].says).format(**rule)


def _rules(rng: random.Random) -> list[Rule]:
    """One to three rules that can be kept together."""
    count = rng.randint(1, 3)
    chosen: list[str] = []
    for name in rng.sample(list(_KINDS), len(_KINDS)):
        if len(chosen) < count and all(_fit(name, other) for other in chosen):
            chosen.append(name)
    return [{"kind": name, **_KINDS[name].draw(rng)} for name in chosen]


def _fit(a: str, b: str) -> bool:
    """Whether one text can keep a rule of either kind."""
    groups = {_KINDS[a].group, _KINDS[b].group}
    if len(groups) < 2 or a in _EXCLUDE.get(b, ()) or b in _EXCLUDE.get(a, ()):
        return False
    return not {a, b} & _FORMS or bool(groups & _BESIDE_FORMS)


def make(index: int, seed: int, split: Split) -> Item:
    rng = rng_for("instructions", split, seed, index)
    while True:  # a topic with its rules belongs to one split, whatever the seed
        topic, rules = rng.choice(_TOPICS), _rules(rng)
        answer = json.dumps(rules)
        if is_heldout(f"{topic} {answer}") == (split == "heldout"):
            break
    told = [rng.choice(_ASK).format(topic), *(wording(rule, rng) for rule in rules)]
    kind = f"{len(rules)} rule{'s' if len(rules) > 1 else ''}"
    message = {"role": "user", "content": " ".join(told)}
    return Item("instructions", kind, index, (message,), answer)


def grade(item: Item, text: str) -> Grade:
    """Right when every rule is kept; each rule counts as a field under its kind."""
    text = visible(text)
    kept = {rule["kind"]: keeps(rule, text) for rule in json.loads(item.answer)}
    return Grade(all(kept.values()), kept)


TASK = Task("instructions", make, grade, max_tokens=1024)
