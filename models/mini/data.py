"""Training text: items of every task as token rows, many documents packed into each.

This module knows the text of the chat template and the tokenizer, not the model. Everything is
drawn from (seed, worker, row), so a run can be stopped and continued at any row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer

from millrace.tasks import arithmetic, chat, policy
from millrace.tasks.items import Item
from millrace.tasks.wording import SYSTEMS

HERE = Path(__file__).parent
END = "<|im_end|>\n"
ANSWER, PROMPT, PAD = 2, 1, 0
POOL = 24


@dataclass(slots=True)
class Row:
    """One packed row: token ids, each token's document (from 1; 0 pads) and its kind as a target.

    kinds: PAD, PROMPT or ANSWER.
    """

    ids: np.ndarray
    documents: np.ndarray
    kinds: np.ndarray


def template() -> jinja2.Template:
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False}

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = _to_json
    return environment.from_string((HERE / "chat_template.jinja").read_text())


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- items as (prompt, completion) pieces --------------------------------------------------------

Pieces = list[tuple[str, bool]]  # text, and whether the model is to say it
Alter = Callable[[random.Random, policy.Policy], None] | None


def completion(item: Item, thinking: bool) -> str:
    """What the assistant says after the generation prompt, which has opened `<think>` already."""
    said = item.answer + "".join(map(chat.call_text, item.tool_calls)) + "<|im_end|>"
    if not thinking:
        return said
    return f"{item.reasoning}\n</think>\n\n{said}" if item.reasoning else f"</think>\n\n{said}"


def _single(render: jinja2.Template, rng: random.Random, item: Item) -> Pieces:
    thinking = rng.random() < (0.9 if item.task == "math" else 0.65)
    messages = list(item.messages)
    if messages[0]["role"] != "system" and rng.random() < 0.25:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    prompt = render.render(
        messages=messages, tools=item.tools, add_generation_prompt=True, enable_thinking=thinking
    )
    return [(prompt, False), (completion(item, thinking), True), ("\n", False)]


# --- facts of any spelling -----------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _word(rng: random.Random, fragments: list[str]) -> str:
    """A word that no list has: letters at random, or pieces of the vocabulary."""
    if rng.random() < 0.5:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 8)))
    return "".join(rng.choice(fragments) for _ in range(rng.randint(1, 3)))


def _phrases(rng: random.Random, fragments: list[str], known: list[str]) -> list[str]:
    return [
        " ".join(_word(rng, fragments) for _ in range(rng.randint(1, 3)))
        if rng.random() < 0.6
        else phrase
        for phrase in known
    ]


def unlisted(fragments: list[str], share: float) -> Callable[[random.Random, policy.Policy], None]:
    """Replaces names, numbers and phrases by ones of any spelling.

    Without it a small model learns the lists of words instead of how to copy.
    """

    def alter(rng: random.Random, facts: policy.Policy) -> None:
        if rng.random() >= share:
            return
        if rng.random() < 0.7:
            names = [_word(rng, fragments).capitalize() for _ in range(rng.randint(1, 3))]
            facts.holder = " ".join(names)
        if rng.random() < 0.6:
            signs = LETTERS.upper() + "0123456789" * 3 + "-/. "
            middle = "".join(rng.choice(signs) for _ in range(rng.randint(2, 12)))
            facts.number = rng.choice(LETTERS.upper()) + middle.strip() + str(rng.randrange(1000))
        if rng.random() < 0.6:
            facts.perils = list(dict.fromkeys(_phrases(rng, fragments, facts.perils)))
            others = _phrases(rng, fragments, facts.exclusions)
            facts.exclusions = [p for p in dict.fromkeys(others) if p not in facts.perils]

    return alter


def fragments_of(tokenizer: Tokenizer) -> list[str]:
    """The vocabulary's pieces that are made of letters."""
    pieces = (token.lstrip("Ġ") for token in sorted(tokenizer.get_vocab()))
    return [piece.lower() for piece in pieces if piece.isascii() and piece.isalpha()]


def _policy_single(render: jinja2.Template, rng: random.Random, alter: Alter) -> Pieces:
    kind, text, answer, thought = policy.conversation(rng, "train", 1, alter)[0]
    message = {"role": "user", "content": text}
    return _single(render, rng, Item("policy", kind, 0, (message,), answer, thought))


def _policy_dialogue(render: jinja2.Template, rng: random.Random, alter: Alter) -> Pieces:
    """Several questions on one document.

    In most, every answer is learnt, each with its reasoning in place; in the others the history is
    what the template makes of it (without reasoning) and only the last answer is learnt.
    """
    turns = policy.conversation(rng, "train", rng.randint(2, 5), alter)
    system = rng.choice((None, None, *SYSTEMS))
    pieces: Pieces = [(f"<|im_start|>system\n{system}{END}", False)] if system else []
    faithful = rng.random() < 0.3
    for turn, (kind, text, answer, thought) in enumerate(turns):
        thinking = rng.random() < 0.65
        pieces.append((f"<|im_start|>user\n{text}{END}<|im_start|>assistant\n", False))
        item = Item("policy", kind, 0, (), answer, thought)
        if faithful and turn < len(turns) - 1:
            pieces.append((answer + END, False))
            continue
        pieces.append(("<think>\n" if thinking else "<think>\n\n</think>\n\n", False))
        pieces += [(completion(item, thinking), True), ("\n", False)]
    return pieces


def draw_pieces(
    render: jinja2.Template, rng: random.Random, math_share: float, alter: Alter = None
) -> Pieces:
    kind, seed = rng.random(), rng.randrange(2**48)
    if kind < math_share:
        return _single(render, rng, arithmetic.make(0, seed, "train"))
    if kind < math_share + 0.06:
        return _single(render, rng, chat.make(0, seed, "train"))
    if rng.random() < 0.5:
        if alter is None:
            return _single(render, rng, policy.make(0, seed, "train"))
        return _policy_single(render, rng, alter)
    return _policy_dialogue(render, rng, alter)


# --- packing -----------------------------------------------------------------------------------


def _encode(tokenizer: Tokenizer, pieces: Pieces) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    kinds: list[int] = []
    for text, said in pieces:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        kinds += [ANSWER if said else PROMPT] * len(piece)
    return ids, kinds


def rows(
    tokenizer: Tokenizer, seed: int, length: int, math_share: float, share: float = 0.0
) -> Iterator[Row]:
    """Packed rows without end of all tasks; each takes from a pool the longest document that fits.

    share: of policies, that with facts of any spelling.
    """
    render, rng = template(), random.Random(seed)
    alter = unlisted(fragments_of(tokenizer), share) if share else None
    return packed(tokenizer, length, lambda: draw_pieces(render, rng, math_share, alter))


def packed(tokenizer: Tokenizer, length: int, draw: Callable[[], Pieces]) -> Iterator[Row]:
    """Packed rows without end of the documents that `draw` makes."""
    pool: list[tuple[list[int], list[int]]] = []
    while True:
        row = Row(*(np.zeros(length, dtype=np.int16) for _ in range(3)))
        at, document = 0, 0
        while True:
            while len(pool) < POOL:
                drawn = _encode(tokenizer, draw())
                pool += [drawn] if len(drawn[0]) <= length else []
            fitting = [i for i, (ids, _) in enumerate(pool) if at + len(ids) <= length]
            if not fitting:
                break
            # The first document of a row is the oldest, so that none waits for ever.
            chosen = max(fitting, key=lambda i: len(pool[i][0])) if document else 0
            ids, kinds = pool.pop(chosen)
            document += 1
            span = slice(at, at + len(ids))
            row.ids[span], row.kinds[span], row.documents[span] = ids, kinds, document
            at += len(ids)
        yield row
