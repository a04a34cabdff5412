"""The prompt of a question: what never changes first, then the policy, the clauses, the question.

Requests of one policy share their prompt up to the clauses, and all requests share the system
message, so the prefix cache has both. Training uses the same functions, so the model reads in
service what it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

SYSTEM = (
    "Answer from the clauses of the policy alone, in JSON: clause, covered (yes, no, "
    "unclear or not stated), amount, deductible, answer."
)
CLAUSES_IN_PROMPT = 5

Message = dict[str, str]


def header(number: str, product: str, edition: int, deductible: int) -> str:
    """The policy in one line: fixed for as long as the policy is."""
    return f"Policy {number}, {product}, edition {edition}. Deductible: EUR {deductible:,}."


def user_message(policy: str, clauses: Sequence[tuple[str, str]], question: str) -> str:
    """policy: its header; clauses: (label, text), the most relevant first."""
    listed = "\n".join(f"{label} {text}" for label, text in clauses)
    return f"{policy}\n{listed}\n\n{question}"


def messages(policy: str, clauses: Sequence[tuple[str, str]], question: str) -> list[Message]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": user_message(policy, clauses, question)},
    ]
