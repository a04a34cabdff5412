"""Asks a running gateway generated questions, by the path of the application, and counts.

python -m examples.insurance.accuracy [--url http://127.0.0.1:8081] [--questions 500]
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from openai import AsyncOpenAI

from examples.insurance.assistant.answer import Assistant
from examples.insurance.build import search_of, store_of
from examples.insurance.documents.insurer import draw_insurer
from examples.insurance.documents.questions import Question, draw_question
from examples.insurance.retrieval.access import Asker, Role

IN_FLIGHT = 8


async def right(assistant: Assistant, role: Role, question: Question) -> tuple[bool, bool, bool]:
    """Whether the decision is right; whether its clause is, too; whether that was retrieved."""
    number = question.policy.number
    asker = Asker(role, number if role == "customer" else "")
    wanted = question.right
    decided, found = False, wanted.clause is None
    clause = False
    async for event in assistant.answer(asker, number, question.text):
        found = found or wanted.clause in {s["label"] for s in event.get("sources", ())}
        if said := event.get("decision"):
            decided = said["covered"] == wanted.covered
            clause = decided and said["clause"] == wanted.clause
    return decided, clause, found


async def count(
    assistant: Assistant, role: Role, questions: list[Question]
) -> list[tuple[bool, bool, bool]]:
    places = asyncio.Semaphore(IN_FLIGHT)

    async def one(question: Question) -> tuple[bool, bool, bool]:
        async with places:
            return await right(assistant, role, question)

    return await asyncio.gather(*map(one, questions))


async def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8081")
    parser.add_argument("--questions", type=int, default=500, help="of each role and kind")
    parser.add_argument("--policies", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("build/insurance"))
    args = parser.parse_args()
    insurer = draw_insurer(args.policies)
    folder = args.folder / "store"
    search = search_of(insurer, store_of(insurer, folder), folder)
    async with AsyncOpenAI(base_url=f"{args.url}/v1", api_key="none", timeout=120) as client:
        assistant = Assistant(insurer, search, client)
        roles: tuple[Role, ...] = ("customer", "operator")
        for role in roles:
            for unseen in (False, True):
                drawn = [draw_question(insurer, i, unseen) for i in range(args.questions)]
                got = await count(assistant, role, drawn)
                shares = [sum(column) / len(got) for column in zip(*got, strict=True)]
                kind = "unseen" if unseen else "seen"
                print(f"{role}, {kind}: decision {shares[0]:.1%}, with its clause {shares[1]:.1%}, "
                      f"clause retrieved {shares[2]:.1%} of {len(got)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
