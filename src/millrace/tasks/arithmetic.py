"""The task `math`: one sum, difference or product of numbers of 1 to 3 digits.

The reasoning works a digit at a time, from the right, with the carry written out: each step needs
only what stands a few tokens before it, which is what lets a very small model be right.
"""

from __future__ import annotations

import random
import re

from millrace.tasks.items import Grade, Item, Split, Task, is_heldout, rng_for, visible

_PHRASES = {
    "+": (
        "{a} + {b}", "{a} + {b} = ?", "What is {a} + {b}?", "Calculate {a} + {b}.",
        "Add {a} and {b}.", "What is the sum of {a} and {b}?", "What is {a} plus {b}?",
        "How much is {a} plus {b}?", "Please compute {a} + {b}.", "{a}+{b}",
        "Two claims of {a} and {b} dollars: what is the total?",
    ),
    "-": (
        "{a} - {b}", "{a} - {b} = ?", "What is {a} - {b}?", "Calculate {a} - {b}.",
        "Subtract {b} from {a}.", "What is {a} minus {b}?", "How much is {a} minus {b}?",
        "What is the difference {a} - {b}?", "Please compute {a} - {b}.", "{a}-{b}",
        "A claim of {a} less a deductible of {b}: how much is that?",
    ),
    "*": (
        "{a} * {b}", "{a} * {b} = ?", "What is {a} * {b}?", "Calculate {a} * {b}.",
        "Multiply {a} by {b}.", "What is the product of {a} and {b}?", "What is {a} times {b}?",
        "How much is {a} times {b}?", "Please compute {a} * {b}.", "{a}*{b}", "{a} x {b}",
        "A premium of {b} is paid {a} times: how much is that in all?",
    ),
}  # fmt: skip


def add_steps(a: int, b: int) -> str:
    """`347+285: 7+5=12 4+8+1=13 3+2+1=6 -> 632`: digits from the right, each with its carry."""
    x, y = str(a)[::-1], str(b)[::-1]
    steps, carry = [], 0
    for place in range(max(len(x), len(y))):
        terms = [int(n[place]) for n in (x, y) if place < len(n)]
        terms += [carry] if carry else []
        total = sum(terms)
        steps.append(f"{'+'.join(map(str, terms))}={total}")
        carry = total // 10
    return f"{a}+{b}: {' '.join(steps)} -> {a + b}"


def subtract_steps(a: int, b: int) -> str:
    """The larger minus the smaller, a borrow shown as 10 added; a swap is said first."""
    if a < b:
        return f"{a}<{b}, so -({b}-{a}). {subtract_steps(b, a)}, negative -> {a - b}"
    x, y = str(a)[::-1], str(b)[::-1]
    steps, borrow = [], 0
    for place, digit in enumerate(x):
        taken = (int(y[place]) if place < len(y) else 0) + borrow
        lack = int(digit) < taken
        minus = (f"-{y[place]}" if place < len(y) else "") + ("-1" if borrow else "")
        left = int(digit) - taken + (10 if lack else 0)
        steps.append(f"{'1' if lack else ''}{digit}{minus}={left}")
        borrow = int(lack)
    return f"{a}-{b}: {' '.join(steps)} -> {a - b}"


def scale_steps(a: int, digit: int) -> str:
    """A number times one digit: `347*5: 7*5=35 4*5+3=23 3*5+2=17 -> 1735`."""
    steps, carry = [], 0
    for d in str(a)[::-1]:
        total = int(d) * digit + carry
        steps.append(f"{d}*{digit}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return f"{a}*{digit}: {' '.join(steps)} -> {a * digit}"


def multiply_steps(a: int, b: int) -> str:
    """Partial products from the right, each added to the sum so far at once."""
    lines, total = [], 0
    for place, d in enumerate(str(b)[::-1]):
        lines.append(scale_steps(a, int(d)))
        part = a * int(d) * 10**place
        if place:
            lines.append(add_steps(total, part))
        total += part
    return "\n".join(lines)


def _operands(rng: random.Random, split: Split) -> tuple[int, str, int]:
    """Lengths are drawn first, so that short numbers are as frequent as long ones."""
    while True:
        op = rng.choice("+-*")
        a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
        if is_heldout(f"{a}{op}{b}") == (split == "heldout"):
            return a, op, b


def make(index: int, seed: int, split: Split) -> Item:
    rng = rng_for("math", split, seed, index)
    a, op, b = _operands(rng, split)
    question = rng.choice(_PHRASES[op]).format(a=a, b=b)
    if op == "+":
        reasoning, value = add_steps(a, b), a + b
    elif op == "-":
        reasoning, value = subtract_steps(a, b), a - b
    else:
        reasoning, value = multiply_steps(a, b), a * b
    kind = {"+": "add", "-": "subtract", "*": "multiply"}[op]
    return Item(
        "math", kind, index, ({"role": "user", "content": question},), str(value), reasoning
    )


def grade(item: Item, text: str) -> Grade:
    """Right when the answer's only number, thousands commas aside, is the reference."""
    numbers = re.findall(r"-?\d+(?:,\d{3})*", visible(text))
    return Grade(len(numbers) == 1 and numbers[0].replace(",", "") == item.answer)


TASK = Task("math", make, grade, max_tokens=384)
