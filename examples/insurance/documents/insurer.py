"""The facts of the generated insurer: forms of conditions, policies, endorsements, claims.

Everything follows from one seed, each form and policy from a random stream of its own, so that
policy 1,234 is the same whether 2,000 policies are made or ten. No text of a document is written
here: that is `writing.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from examples.insurance.documents import wording as w
from millrace.tasks import wording as names

SEED = 31
SUMS = (500, 1000, 1500, 2000, 2500, 3000, 4000, 5000, 7500, 10000, 15000, 20000, 25000, 50000)
DEDUCTIBLES = (100, 150, 200, 250, 300, 400, 500, 750, 1000)
CLAIM_SHARE = 0.4  # of policies that have had claims


@dataclass(frozen=True, slots=True)
class Clause:
    """One numbered statement. verdict: yes, no or unclear on its topic; "" for a general clause."""

    label: str
    section: str
    text: str
    topic: str = ""
    verdict: str = ""
    amount: int | None = None
    deductible: int | None = None
    unseen: bool = False  # worded as no training text is


@dataclass(frozen=True, slots=True)
class Form:
    """The conditions of a product in one edition, the same for all who have it."""

    name: str
    product: str
    edition: int
    clauses: tuple[Clause, ...]

    def on(self, topic: str) -> Clause | None:
        return next((clause for clause in self.clauses if clause.topic == topic), None)


@dataclass(frozen=True, slots=True)
class Endorsement:
    """A change to one policy. replaces: the label of the clause that holds no longer, if any."""

    clause: Clause
    replaces: str | None


@dataclass(frozen=True, slots=True)
class Claim:
    number: str
    topic: str
    date: str
    amount: int
    status: str
    remark: str


@dataclass(frozen=True, slots=True)
class Policy:
    """forms: of all terms, the last in force. note and claims' remarks are for operators only."""

    number: str
    holder: str
    address: str
    forms: tuple[str, ...]
    deductible: int
    sum_insured: int
    endorsements: tuple[Endorsement, ...]
    note: str
    letter: str
    scanned: bool
    claims: tuple[Claim, ...] = field(default=())

    @property
    def form(self) -> str:
        return self.forms[-1]


@dataclass(frozen=True, slots=True)
class Insurer:
    forms: dict[str, Form]
    policies: tuple[Policy, ...]

    def clause_on(self, policy: Policy, topic: str) -> Clause | None:
        """What the policy says on a topic today: its endorsement, or else its form's clause."""
        for change in policy.endorsements:
            if change.clause.topic == topic:
                return change.clause
        return self.forms[policy.form].on(topic)


def money(amount: int) -> str:
    return f"EUR {amount:,}"


# --- clauses -------------------------------------------------------------------------------------


def draw_clause(
    rng: random.Random, label: str, topic: str, verdict: str, unseen: bool = False,
    more: Sequence[str] = (),
) -> Clause:  # fmt: skip
    """A clause with a wording of its verdict; some have a limit, some a deductible of their own.

    more: wordings beside the insurer's own.
    """
    known = w.TOPICS[topic]
    wordings = (*(w.UNSEEN if unseen else w.CLAUSES)[verdict], *more)
    amount = rng.choice(SUMS) if verdict != "no" and rng.random() < 0.6 else None
    deductible = rng.choice(DEDUCTIBLES) if verdict == "yes" and rng.random() < 0.25 else None
    limit = rng.choice(w.LIMITS).format(money(amount)) if amount else ""
    text = rng.choice(wordings).format(what=rng.choice(known.names), limit=limit)
    text = text[0].upper() + text[1:]
    text += rng.choice(w.OWN_DEDUCTIBLE).format(money(deductible)) if deductible else ""
    return Clause(label, known.section, text, topic, verdict, amount, deductible, unseen)


def draw_verdict(rng: random.Random) -> str:
    return rng.choices(("yes", "no", "unclear"), (0.5, 0.35, 0.15))[0]


def draw_form(product: str, edition: int, seed: int) -> Form:
    """About four topics in five are dealt with. The newest edition has wordings of its own too."""
    rng = random.Random(f"form/{seed}/{product}/{edition}")
    sections: dict[str, list[tuple[str, str]]] = {}
    for topic, known in w.TOPICS.items():
        if rng.random() < 0.8:
            sections.setdefault(known.section, []).append((topic, ""))
    for section, text in w.GENERAL:
        sections.setdefault(section, []).append(("", text))
    clauses = []
    for chapter, (section, members) in enumerate(sections.items(), 1):
        rng.shuffle(members)
        for number, (topic, text) in enumerate(members, 1):
            label = f"{chapter}.{number}"
            unseen = edition == w.EDITIONS[-1] and rng.random() < 0.5
            clauses.append(
                draw_clause(rng, label, topic, draw_verdict(rng), unseen)
                if topic
                else Clause(label, section, text)
            )
    return Form(f"{product}-{edition}", product, edition, tuple(clauses))


# --- policies ------------------------------------------------------------------------------------


def _holder(rng: random.Random) -> str:
    return f"{rng.choice(names.FIRST_NAMES)} {rng.choice(names.LAST_NAMES)}"


def _address(rng: random.Random) -> str:
    street = rng.choice(names.COMPANY_WORDS)
    return f"{rng.randint(1, 180)} {street} Road, {rng.choice(names.LAST_NAMES)}ville"


def _endorsements(rng: random.Random, form: Form) -> Sequence[Endorsement]:
    """One to three changes: a clause replaced, or a topic that the form is silent on."""
    made = []
    for number, topic in enumerate(rng.sample(list(w.TOPICS), rng.randint(1, 3)), 1):
        before = form.on(topic)
        verdicts = [v for v in ("yes", "no", "unclear") if before is None or v != before.verdict]
        clause = draw_clause(rng, f"E{number}", topic, rng.choice(verdicts))
        made.append(Endorsement(clause, before.label if before else None))
    return made


def _claims(rng: random.Random, policy: int) -> tuple[Claim, ...]:
    if rng.random() >= CLAIM_SHARE:
        return ()
    return tuple(
        Claim(
            number=f"CL-{100000 + policy * 3 + index}",
            topic=rng.choice(list(w.TOPICS)),
            date=f"{rng.randint(2020, 2026)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
            amount=rng.randint(2, 90) * 50,
            status=rng.choice(w.STATUSES),
            remark=f"Handler's remark: reserve {money(rng.randint(1, 60) * 100)}.",
        )
        for index in range(rng.randint(1, 3))
    )


def draw_policy(index: int, forms: dict[str, Form], seed: int) -> Policy:
    rng = random.Random(f"policy/{seed}/{index}")
    product = rng.choice(list(w.PRODUCTS))
    number = f"{product}-{100000 + index * 37 + rng.randrange(37)}"
    terms = sorted(rng.sample(w.EDITIONS, rng.randint(1, len(w.EDITIONS))))
    held = tuple(f"{product}-{edition}" for edition in terms)
    letter = rng.choice(w.LETTERS)
    if index % 20 == 7:
        letter += " " + rng.choice(w.INJECTIONS)
    return Policy(
        number=number,
        holder=_holder(rng),
        address=_address(rng),
        forms=held,
        deductible=rng.choice(DEDUCTIBLES),
        sum_insured=rng.randint(4, 90) * 10000,
        endorsements=tuple(_endorsements(rng, forms[held[-1]])),
        note=rng.choice(w.NOTES).format(n=rng.randint(3, 97)),
        letter=letter,
        scanned=rng.random() < 0.3,
        claims=_claims(rng, index),
    )


def draw_insurer(policies: int = 2000, seed: int = SEED) -> Insurer:
    """The whole insurer of a seed."""
    made = [draw_form(product, edition, seed) for product in w.PRODUCTS for edition in w.EDITIONS]
    forms = {form.name: form for form in made}
    return Insurer(forms, tuple(draw_policy(i, forms, seed) for i in range(policies)))
