"""The task `policy`: an insurance policy, a question or a request for all fields, a JSON answer.

A document is drawn in three steps, each with the item's own random stream: the facts, the clauses
that state them (in any order, among clauses that state something else), and the question. The
answer is made from the facts, never read back from the text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from millrace.tasks import wording as w
from millrace.tasks.items import Grade, Item, Split, Task, draw, rng_for, visible

Answer = dict[str, Any]


@dataclass(slots=True)
class Policy:
    """The facts. water: yes, no or not stated, of water damage from a washing machine."""

    holder: str
    number: str
    start: tuple[int, int, int]
    end: tuple[int, int, int]
    perils: list[str]
    exclusions: list[str]
    currency: str
    deductible: int
    limits: dict[str, int]
    water: str


@dataclass(slots=True)
class Document:
    """The text of a policy, and the labels of the clauses that an answer may have to name."""

    text: str
    cover: str
    exclude: str
    water: str | None
    water_text: str | None


# --- facts -------------------------------------------------------------------------------------


def _surname(rng: random.Random) -> str:
    """Half of the surnames are made up, so that copying is learnt and not a list of names."""
    if rng.random() < 0.5:
        return rng.choice(w.LAST_NAMES)
    return "".join(rng.choice(w.SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def _holder(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.2:
        words = (w.COMPANY_WORDS, w.COMPANY_TRADES, w.COMPANY_FORMS)
        return " ".join(rng.choice(part) for part in words)
    first, last = rng.choice(w.FIRST_NAMES), _surname(rng)
    if kind < 0.3:
        return f"{first} and {rng.choice(w.FIRST_NAMES)} {last}"
    if kind < 0.4:
        return f"{first} {rng.choice('ABCDEFGHJKLMPRSTW')}. {last}"
    return f"{rng.choice(w.TITLES)}{first} {last}"


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _number(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return rng.choice(
        (
            f"{letters}-{_digits(rng, 6)}",
            f"{letters} {_digits(rng, 2)}-{_digits(rng, 4)}-{rng.choice('ABCDEFGHKQXZ')}",
            f"{letters}/{rng.randint(2015, 2029)}/{_digits(rng, 5)}",
            f"{_digits(rng, 3)}.{_digits(rng, 3)}.{_digits(rng, 3)}",
            f"{letters}{_digits(rng, 8)}",
            _digits(rng, 9),
        )
    )


def _date(rng: random.Random, year: int) -> tuple[int, int, int]:
    return year, rng.randint(1, 12), rng.randint(1, 28)


def _amount(rng: random.Random, low: int, high: int) -> int:
    """A round sum, its size uniform in the number of digits."""
    digits = rng.randint(low, high)
    return int(rng.choice((rng.randint(1, 9) * 10, rng.randint(10, 99))) * 10 ** (digits - 2))


def draw_policy(rng: random.Random, split: Split) -> Policy:
    perils = rng.sample(w.PERILS, rng.randint(2, 6))
    excluded = [e for e in (*w.EXCLUSIONS, *w.PERILS[8:13]) if e not in perils]
    year = rng.randint(2018, 2029)
    kinds = rng.sample(list(w.LIMIT_KINDS), rng.randint(1, 4))
    return Policy(
        holder=draw(rng, split, _holder),
        number=draw(rng, split, _number),
        start=_date(rng, year),
        end=_date(rng, year + rng.choice((1, 1, 1, 2, 3))),
        perils=perils,
        exclusions=rng.sample(excluded, rng.randint(2, 5)),
        currency=rng.choice(list(w.CURRENCIES)),
        deductible=0 if rng.random() < 0.06 else _amount(rng, 3, 4),
        limits={kind: _amount(rng, 4, 7) for kind in kinds},
        water=rng.choices(("yes", "no", "not stated"), (0.45, 0.4, 0.15))[0],
    )


# --- text --------------------------------------------------------------------------------------


def _iso(date: tuple[int, int, int]) -> str:
    return f"{date[0]:04d}-{date[1]:02d}-{date[2]:02d}"


def _date_text(style: int, date: tuple[int, int, int]) -> str:
    year, month, day = date
    name = w.MONTHS[month - 1]
    return (
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        _iso(date),
        f"{day:02d}.{month:02d}.{year}",
        f"the {day}{_ordinal(day)} of {name} {year}",
        f"{day:02d}-{name[:3]}-{year}",
    )[style]


def _ordinal(day: int) -> str:
    return "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _money(rng: random.Random, currency: str, amount: int) -> str:
    comma = rng.random() < 0.7
    return rng.choice(w.CURRENCIES[currency]).format(f"{amount:,}" if comma else amount)


def _listing(rng: random.Random, parts: list[str]) -> str:
    """Parts as one phrase, or as lettered or dashed lines under it."""
    style = rng.random()
    if style < 0.2:
        return "\n" + "\n".join(f"- {part}" for part in parts) + "\n"
    if style < 0.35:
        return ", ".join(f"({'abcdefgh'[i]}) {part}" for i, part in enumerate(parts))
    comma, last = rng.choice(w.AND_LISTS)
    return comma.join(parts[:-1]) + last + parts[-1] if len(parts) > 1 else parts[0]


def _sentence(template: str, listing: str) -> str:
    """A listing on lines of its own ends the clause, so nothing may follow it."""
    if not listing.startswith("\n"):
        return template.format(listing)
    before, after = template.split("{}")
    return f"{before.rstrip()}{listing.rstrip()}" + (f"\n{after.strip()}" if len(after) > 2 else "")


def _limit_clauses(rng: random.Random, policy: Policy) -> list[str]:
    named = [(rng.choice(w.LIMIT_KINDS[k]), policy.limits[k]) for k in policy.limits]
    if rng.random() < 0.5:
        template = rng.choice(w.LIMIT_ONE)
        one = [template.format(kind=k, sum=_money(rng, policy.currency, s)) for k, s in named]
        return [" ".join(one)]
    joint = rng.choice((": {}", " {}", " up to {}", " - {}"))
    parts = [k + joint.format(_money(rng, policy.currency, s)) for k, s in named]
    return [_sentence(rng.choice(w.LIMIT_LIST), _listing(rng, parts))]


def _fillers(rng: random.Random, policy: Policy, count: int) -> list[str]:
    return [
        text.format(
            n=rng.randint(2, 90),
            sum=_money(rng, policy.currency, _amount(rng, 2, 3) + rng.randint(1, 9)),
            phone=_digits(rng, 9),
            broker=f"{rng.choice(w.FIRST_NAMES)} {_surname(rng)}",
            form=f"{rng.choice('ABCFHP')}{_digits(rng, 3)}",
        )
        for text in rng.sample(w.FILLER, count)
    ]


def _label_style(rng: random.Random) -> tuple[str, str, int]:
    """How a clause's label is written in the document and in an answer, and the first number."""
    chapter = rng.randint(1, 9)
    shown, named = rng.choice(
        (
            ("{}.", "{}"),
            (f"{chapter}.{{}}", f"{chapter}.{{}}"),
            ("§{}", "§{}"),
            ("Clause {}:", "{}"),
            ("(C{})", "C{}"),
            ("Art. {}", "{}"),
            (f"[{chapter}-{{}}]", f"{chapter}-{{}}"),
        )
    )
    return shown, named, rng.choice((1, 1, 1, rng.randint(2, 40)))


def _water_clause(rng: random.Random, policy: Policy) -> str | None:
    if policy.water == "not stated":
        return None
    template = rng.choice(w.WATER_YES if policy.water == "yes" else w.WATER_NO)
    text = template.format(rng.choice(w.APPLIANCES))
    return text[0].upper() + text[1:]


def _deductible_clause(rng: random.Random, policy: Policy) -> str:
    if not policy.deductible:
        return rng.choice(w.NO_DEDUCTIBLE)
    return rng.choice(w.DEDUCTIBLE).format(_money(rng, policy.currency, policy.deductible))


def _declarations(rng: random.Random, policy: Policy) -> str:
    """The first page: title, insurer, and who is insured, under which number, from when to when."""
    style = rng.randrange(6)
    start, end = _date_text(style, policy.start), _date_text(style, policy.end)
    facts = [
        rng.choice(w.HOLDER).format(policy.holder),
        rng.choice(w.NUMBER).format(policy.number),
        rng.choice(w.PERIOD).format(a=start, b=end),
    ]
    if rng.random() < 0.4:
        issued = _date(rng, policy.start[0] - rng.randint(0, 1))
        facts.append(rng.choice(w.ISSUED).format(_date_text(style, issued)))
    rng.shuffle(facts)
    title = rng.choice(w.PRODUCTS)
    insurer = rng.choice(w.INSURERS)
    head = rng.choice((f"{insurer}\n{title}", f"{title} of {insurer}"))
    head = head.upper() if rng.random() < 0.3 else head
    return head + "\n" + ("\n" if rng.random() < 0.7 else " ").join(facts)


def write_document(rng: random.Random, policy: Policy, fillers: int) -> Document:
    """The facts as clauses in any order, numbered in one of several ways."""
    water = _water_clause(rng, policy)
    cover = _sentence(rng.choice(w.COVER), _listing(rng, policy.perils))
    exclude = _sentence(rng.choice(w.EXCLUDE), _listing(rng, policy.exclusions))
    clauses = [cover, exclude, _deductible_clause(rng, policy), *_limit_clauses(rng, policy)]
    clauses += [water] if water else []
    clauses += rng.sample(w.WATER_OTHER, rng.choice((0, 0, 1, 2)))
    clauses += _fillers(rng, policy, fillers)
    rng.shuffle(clauses)
    shown, named, first = _label_style(rng)
    lines = [f"{shown.format(first + i)} {text}" for i, text in enumerate(clauses)]
    parts = [_declarations(rng, policy), rng.choice(w.HEADINGS), *lines]

    def label(text: str) -> str:
        return named.format(first + clauses.index(text))

    return Document(
        text="\n".join(part for part in parts if part),
        cover=label(cover),
        exclude=label(exclude),
        water=label(water) if water else None,
        water_text=water,
    )


# --- questions ---------------------------------------------------------------------------------


def _whole(policy: Policy, document: Document) -> Answer:
    return {
        "policyholder": policy.holder,
        "policy_number": policy.number,
        "period": {"from": _iso(policy.start), "to": _iso(policy.end)},
        "covered_perils": policy.perils,
        "exclusions": policy.exclusions,
        "currency": policy.currency,
        "deductible": policy.deductible,
        "limits": policy.limits,
        "washing_machine": {"covered": policy.water, "clause": document.water},
    }


def _ask_peril(rng: random.Random, policy: Policy, document: Document) -> tuple[str, Answer, str]:
    known = {*policy.perils, *policy.exclusions}
    choices: tuple[tuple[str, list[str], str | None], ...] = (
        ("yes", policy.perils, document.cover),
        ("no", policy.exclusions, document.exclude),
        ("not stated", [p for p in w.PERILS if p not in known], None),
    )
    covered, phrases, clause = rng.choice(choices)
    phrase = rng.choice(phrases)
    question = rng.choice(w.ASK["peril"]).format(phrase)
    return question, {"covered": covered, "clause": clause}, f"Find {phrase}."


def _ask_limit(rng: random.Random, policy: Policy) -> tuple[str, Answer, str]:
    missing = [kind for kind in w.LIMIT_KINDS if kind not in policy.limits]
    kind = rng.choice(list(policy.limits) if rng.random() < 0.85 else missing)
    question = rng.choice(w.ASK["limit"]).format(rng.choice(w.LIMIT_KINDS[kind]))
    answer: Answer = {"limit": policy.limits.get(kind), "currency": policy.currency}
    return question, answer, f"Find the limit: {kind}."


def ask(
    rng: random.Random, kind: str, policy: Policy, document: Document
) -> tuple[str, Answer, str]:
    """A question of one kind, its answer, and what to think before answering."""
    whole = _whole(policy, document)
    if kind == "peril":
        return _ask_peril(rng, policy, document)
    if kind == "limit":
        return _ask_limit(rng, policy)
    question, thought = rng.choice(w.ASK[kind]), f"Find the {kind.replace('_', ' ')}."
    if kind == "extract":
        return question, whole, "Extract all fields."
    if kind == "washing_machine":
        return question, {**whole[kind], "quote": document.water_text}, thought
    answer: Answer = {kind: whole[kind]}
    if kind in ("deductible", "limits"):
        answer["currency"] = policy.currency
    return question, answer, thought


# How often each kind is asked: the questions that need two looks at the document are learnt last,
# so training asks them more often.
KINDS = tuple(w.ASK)
OFTEN = {
    "train": tuple({"extract": 5, "peril": 4, "limit": 3}.get(kind, 1) for kind in KINDS),
    "heldout": tuple({"extract": 8}.get(kind, 1) for kind in KINDS),
}


def compose(rng: random.Random, document: str, question: str) -> str:
    """The user's message: the document mostly before the question."""
    style = rng.random()
    if style < 0.15:
        return f"{question}\n\n{document}"
    if style < 0.35:
        return f"<policy>\n{document}\n</policy>\n{question}"
    return f"{document}\n\n{question}"


def conversation(
    rng: random.Random,
    split: Split,
    questions: int,
    alter: Callable[[random.Random, Policy], None] | None = None,
) -> list[tuple[str, str, str, str]]:
    """(kind, user message, answer, thought) of each turn; the document is in the first message.

    alter may change the facts before the document is written.
    """
    policy = draw_policy(rng, split)
    if alter:
        alter(rng, policy)
    document = write_document(rng, policy, fillers=rng.randint(1, 14))
    turns = []
    for turn in range(questions):
        kind = rng.choices(KINDS, OFTEN[split])[0]
        question, answer, thought = ask(rng, kind, policy, document)
        text = question if turn else compose(rng, document.text, question)
        turns.append((kind, text, json.dumps(answer, ensure_ascii=False), thought))
    return turns


def make(index: int, seed: int, split: Split) -> Item:
    rng = rng_for("policy", split, seed, index)
    system = rng.choice((None, *w.SYSTEMS))
    kind, text, answer, thought = conversation(rng, split, 1)[0]
    messages: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": text},)
    if system:
        messages = ({"role": "system", "content": system}, *messages)
    return Item("policy", kind, index, messages, answer, thought)


# --- grading -----------------------------------------------------------------------------------


def _parse(text: str) -> Answer:
    """The JSON object of an answer, with or without a code fence; {} when there is none."""
    text = visible(text).removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def grade(item: Item, text: str) -> Grade:
    """Field by field against the reference; correct when all are and none was added."""
    expected, given = json.loads(item.answer), _parse(text)
    fields = {name: name in given and given[name] == expected[name] for name in expected}
    return Grade(all(fields.values()) and given.keys() == expected.keys(), fields)


TASK = Task("policy", make, grade, max_tokens=448)
