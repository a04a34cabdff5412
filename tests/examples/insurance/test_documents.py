"""Papers are written from facts; chunks and clauses read from the papers say the same again."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from examples.insurance.documents.insurer import Insurer, draw_insurer
from examples.insurance.documents.writing import INTERNAL, scanned, write_all
from examples.insurance.retrieval.chunks import all_chunks, chunks_of, cleaned
from examples.insurance.training.dialogues import draw_dialogue


def test_a_seed_makes_the_same_insurer(insurer: Insurer) -> None:
    assert draw_insurer(60) == insurer
    assert draw_insurer(70).policies[:60] == insurer.policies


def test_every_clause_is_a_chunk_with_its_own_words(insurer: Insurer) -> None:
    """Also those of scanned endorsements: running heads, breaks and misread letters are mended."""
    by_id = {chunk.id: chunk for chunk in all_chunks(write_all(insurer))}
    for form in insurer.forms.values():
        for clause in form.clauses:
            chunk = by_id[f"{form.name}#{clause.label}"]
            assert (chunk.text, chunk.section) == (clause.text, clause.section)
    for policy in insurer.policies:
        for change in policy.endorsements:
            chunk = by_id[f"{policy.number}-endorsements#{change.clause.label}"]
            assert chunk.text == change.clause.text
            assert chunk.replaces == (change.replaces or "")
    assert any(policy.scanned for policy in insurer.policies)


def test_internal_papers_are_internal_chunks(insurer: Insurer) -> None:
    for document in write_all(insurer):
        for chunk in chunks_of(document):
            assert chunk.internal == (document.kind in INTERNAL)
            assert chunk.policy == document.policy


@given(st.integers(0, 10**6), st.lists(st.sampled_from(["loss", "water", "policy", "pays"])))
def test_a_scan_is_read_back(seed: int, words: list[str]) -> None:
    text = f"E1 We pay {' '.join(words)} EUR 1,500."
    again = cleaned(scanned(random.Random(seed), text, "head")).replace("\n", " ")
    assert again.split() == text.split()


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_training_answers_are_borne_out_by_their_prompt(seed: int, questions: int) -> None:
    """Each clause and sum that is learnt stands in the prompt."""
    from examples.insurance.assistant.decision import checked, parse

    turns = draw_dialogue(random.Random(seed), questions)
    policy, *lines = turns[0].said.split("\n\n")[0].split("\n")
    clauses = dict(line.split(" ", 1) for line in lines)
    for turn in turns:
        decision = parse(turn.answer)
        assert decision is not None
        assert checked(decision, clauses, policy) == decision
