"""Training dialogues: a prompt with clauses, and several questions on it with their answers.

Only wordings that training may see are drawn (`documents/wording.py` keeps others back), and no
policy, form or claim of the generated insurer: its facts come from other random streams.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.insurance.assistant.decision import reference
from examples.insurance.assistant.prompt import CLAUSES_IN_PROMPT, SYSTEM, header, user_message
from examples.insurance.documents import phrases
from examples.insurance.documents import wording as w
from examples.insurance.documents.insurer import DEDUCTIBLES, Clause, draw_clause, draw_verdict
from examples.insurance.training import wordings

DROPPED_SHARE = 0.3  # of phrases in questions that lose a word
FIRST_SHARE = 0.65  # of first questions, whose clause stands first, as a search mostly has it


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says, and the assistant's answer."""

    said: str
    answer: str


def _label(rng: random.Random, taken: set[str]) -> str:
    while True:
        endorsed = rng.random() < 0.15
        label = f"E{rng.randint(1, 3)}" if endorsed else f"{rng.randint(1, 9)}.{rng.randint(1, 8)}"
        if label not in taken:
            taken.add(label)
            return label


def _clauses(rng: random.Random, topics: list[str]) -> list[Clause]:
    taken: set[str] = set()
    verdicts = [(topic, draw_verdict(rng)) for topic in topics]
    made = [
        draw_clause(rng, _label(rng, taken), topic, verdict, more=wordings.CLAUSES[verdict])
        for topic, verdict in verdicts
    ]
    if rng.random() < 0.3:
        section, text = rng.choice(w.GENERAL)
        made[-1] = Clause(made[-1].label, section, text)
    return made


def _topics(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """The topic of the first question, others as a search brings with it, and absent ones."""
    first = rng.choice(list(w.TOPICS))
    near = [t for t, k in w.TOPICS.items() if k.section == w.TOPICS[first].section and t != first]
    far = [t for t in w.TOPICS if t != first and t not in near]
    rng.shuffle(near)
    rng.shuffle(far)
    others = near[: rng.randint(1, CLAUSES_IN_PROMPT - 1)]
    others += far[: CLAUSES_IN_PROMPT - 1 - len(others)]
    absent = [t for t in (*near, *far) if t not in others]
    return first, others, absent[:6]


def ask(rng: random.Random, topic: str) -> str:
    """A question on a topic, as training may see it, and as people type it."""
    phrase = rng.choice((*w.TOPICS[topic].asked[:-1], *phrases.known(topic)))
    if rng.random() < DROPPED_SHARE:
        phrase = _with_a_word_less(rng, phrase)
    text = rng.choice((*w.QUESTIONS, *wordings.QUESTIONS)).format(phrase)
    return text.lower() if rng.random() < 0.1 else text


def _with_a_word_less(rng: random.Random, phrase: str) -> str:
    """So that the model reads words, and does not know phrases by their beginnings."""
    words = phrase.split(" ")
    if len(words) > 2:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def draw_dialogue(rng: random.Random, questions: int) -> list[Turn]:
    """The first question is one that a search has brought the clauses for; the others go on."""
    first, others, absent = _topics(rng)
    present = rng.random() >= 0.15
    clauses = _clauses(rng, [first, *others] if present else [absent[0], *others])
    head, tail = clauses[:1], clauses[1:]
    rng.shuffle(tail)
    at = 0 if rng.random() < FIRST_SHARE else rng.randint(1, len(tail))
    listed = [*tail[:at], *head, *tail[at:]]
    general = rng.choice(DEDUCTIBLES)
    product, name = rng.choice(list(w.PRODUCTS.items()))
    number = f"{product}-{rng.randint(100000, 999999)}"
    policy = header(number, name, rng.randint(2016, 2028), general)
    shown = user_message(policy, [(c.label, c.text) for c in listed], "").rstrip()
    asked = [first, *rng.sample([*others, *absent[1:3]], questions - 1)]
    turns = []
    for turn, topic in enumerate(asked):
        clause = next((c for c in listed if c.topic == topic), None)
        answer = (
            reference(clause.verdict, clause.label, clause.amount, clause.deductible, general)
            if clause
            else reference("", None, None, None, general)
        )
        question = ask(rng, topic)
        said = question if turn else f"{shown}\n\n{question}"
        turns.append(Turn(said, answer.to_json()))
    return turns


def pieces(rng: random.Random, questions: int) -> list[tuple[str, bool]]:
    """A dialogue as text of the chat template without thinking; True: what the model is to say."""
    made = [(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", False)]
    for turn in draw_dialogue(rng, questions):
        opened = f"<|im_start|>user\n{turn.said}<|im_end|>\n<|im_start|>assistant\n"
        made.append((opened + "<think>\n\n</think>\n\n", False))
        made += [(turn.answer + "<|im_end|>", True), ("\n", False)]
    return made
