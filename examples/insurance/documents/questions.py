"""Questions with known answers: what a policy says on a topic, and the clause that says it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.insurance.assistant.decision import Decision, reference
from examples.insurance.documents import phrases
from examples.insurance.documents import wording as w
from examples.insurance.documents.insurer import Insurer, Policy


@dataclass(frozen=True, slots=True)
class Question:
    """unseen: whether the form, the phrase or the clause is worded as no training text is."""

    policy: Policy
    topic: str
    text: str
    right: Decision
    unseen: bool


def draw_question(
    insurer: Insurer, index: int, unseen: bool, stated: bool | None = None, seed: int = 0
) -> Question:
    """stated: whether the policy has a clause on the topic; None: as it comes (nine in ten do)."""
    rng = random.Random(f"question/{seed}/{unseen}/{index}")
    wanted = rng.random() < 0.9 if stated is None else stated
    while True:
        policy = rng.choice(insurer.policies)
        topic = rng.choice(list(w.TOPICS))
        clause = insurer.clause_on(policy, topic)
        if (clause is not None) == wanted:
            break
    known = w.TOPICS[topic]
    if unseen:
        phrase = rng.choice((known.asked[-1], *phrases.held_out(topic)))
        text = rng.choice(w.UNSEEN_QUESTIONS).format(phrase)
    else:
        phrase = rng.choice((*known.asked[:-1], *phrases.known(topic)))
        text = rng.choice(w.QUESTIONS).format(phrase)
    right = (
        reference(clause.verdict, clause.label, clause.amount, clause.deductible, policy.deductible)
        if clause
        else reference("", None, None, None, policy.deductible)
    )
    return Question(policy, topic, text, right, unseen or bool(clause and clause.unseen))
