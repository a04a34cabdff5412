"""Writes the prompts of generated questions for `millrace bench`, as the application sends them.

    python -m examples.insurance.prompts --questions 500 --out build/insurance/prompts.jsonl

`millrace bench serve --backend openai-chat --dataset-name custom --dataset-path FILE` sends them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from examples.insurance.assistant.prompt import CLAUSES_IN_PROMPT, header, messages
from examples.insurance.build import search_of, store_of
from examples.insurance.documents.insurer import Insurer, draw_insurer
from examples.insurance.documents.questions import draw_question
from examples.insurance.documents.wording import PRODUCTS
from examples.insurance.retrieval.access import Asker
from examples.insurance.retrieval.search import Search

OUTPUT_TOKENS = 60  # of a decision


def prompt_lines(insurer: Insurer, search: Search, count: int) -> Iterator[str]:
    """Lines of bench's dataset `custom`; policies and questions repeat as a day's do."""
    for number in range(count):
        question = draw_question(insurer, number, number % 2 == 1)
        policy = question.policy
        asker = Asker("customer", policy.number)
        hits = search.clauses(asker, policy.number, question.text, CLAUSES_IN_PROMPT)
        product, edition = policy.form.split("-")
        line = header(policy.number, PRODUCTS[product], int(edition), policy.deductible)
        clauses = [(hit.chunk.label, hit.chunk.text) for hit in hits]
        said = messages(line, clauses, question.text)
        yield json.dumps({"messages": said, "output_tokens": OUTPUT_TOKENS}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--policies", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("build/insurance"))
    parser.add_argument("--out", type=Path, default=Path("build/insurance/prompts.jsonl"))
    args = parser.parse_args()
    insurer = draw_insurer(args.policies)
    folder = args.folder / "store"
    search = search_of(insurer, store_of(insurer, folder), folder)
    args.out.write_text("".join(prompt_lines(insurer, search, args.questions)))
    print(args.out)


if __name__ == "__main__":
    main()
