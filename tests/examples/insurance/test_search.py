"""What a search finds, and what it can never find: every document, both roles, both halves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.insurance.build import entries
from examples.insurance.documents import phrases
from examples.insurance.documents.insurer import Insurer, Policy
from examples.insurance.documents.questions import draw_question
from examples.insurance.documents.wording import TOPICS
from examples.insurance.documents.writing import write_all
from examples.insurance.retrieval.access import Access, Asker
from examples.insurance.retrieval.chunks import Chunk, all_chunks
from examples.insurance.retrieval.embeddings import Embedder, Vectors, WordPieces, masked
from examples.insurance.retrieval.glossary import Entry, Glossary
from examples.insurance.retrieval.lexical import LexicalIndex
from examples.insurance.retrieval.search import Search
from examples.insurance.retrieval.store import Store

OPERATOR = Asker("operator")


def customer(policy: Policy) -> Asker:
    return Asker("customer", policy.number)


def test_rows_are_what_may_be_seen_and_nothing_else(insurer: Insurer, search: Search) -> None:
    """For every policy as asker, and every policy as the one that is asked about."""
    access, chunks = search.access, search._store.chunks  # what the scopes are made of
    for asked in insurer.policies:
        rows = access.rows(OPERATOR, asked.number)
        assert {chunks[r].policy for r in rows} <= {asked.number, ""}
        for policy in insurer.policies:
            seen = [chunks[r] for r in access.rows(customer(policy), asked.number)]
            assert all(may_read(policy, chunk) for chunk in seen)


def may_read(policy: Policy, chunk: Chunk) -> bool:
    """The rule once more, from the facts: own papers that are not internal, and the own form."""
    if chunk.kind in ("note", "claim", "guideline"):
        return False
    return chunk.policy == policy.number or (not chunk.policy and chunk.form == policy.form)


@pytest.mark.parametrize("asker", [Asker("customer"), Asker("customer", "XX-1")])
def test_an_asker_of_no_policy_sees_nothing(insurer: Insurer, search: Search, asker: Asker) -> None:
    number = insurer.policies[0].number
    assert not any(search.access.may_see(asker, chunk) for chunk in search._store.chunks)
    assert search.papers(asker, number, "fire", 5) == []


def test_every_chunk_asked_for_by_its_own_words_is_found_by_whom_it_is_for(
    insurer: Insurer, search: Search
) -> None:
    """The sharpest question is the text itself. No other customer finds it, injections included."""
    other = {p.number: q for p, q in zip(insurer.policies, insurer.policies[1:], strict=False)}
    for policy in insurer.policies[:-1]:
        for row in search.access.rows(OPERATOR, policy.number):
            chunk = search._store.chunks[row]
            hits = search.papers(customer(policy), policy.number, chunk.text, 5)
            assert all(may_read(policy, hit.chunk) for hit in hits)
            hits = search.papers(customer(other[policy.number]), policy.number, chunk.text, 5)
            assert all(may_read(other[policy.number], hit.chunk) for hit in hits)
            if chunk.policy:
                found = search.papers(OPERATOR, policy.number, f"{chunk.label} {chunk.text}", 5)
                assert chunk.id in {hit.chunk.id for hit in found}


class Watched:
    """An embedder that fails if it is to embed a text twice, or none."""

    name = "watched"

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._inner: Embedder = WordPieces()

    def passages(self, texts: list[str]) -> Vectors:
        self.texts += texts
        return self._inner.passages(texts)

    def query(self, text: str) -> Vectors:
        return self._inner.query(text)


def test_no_score_is_made_of_what_may_not_be_seen(
    insurer: Insurer, store: Store, glossary: Glossary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both halves are asked for scores of seen rows alone: they are filtered before, not after."""
    asked: list[str] = []
    similarities, made = Store.similarities, LexicalIndex.__init__

    def watched_vectors(self: Store, question: str, rows: np.ndarray) -> np.ndarray:
        asked.extend(self.chunks[r].id for r in rows)
        return similarities(self, question, rows)

    def watched_words(self: LexicalIndex, texts: list[str]) -> None:
        known = {f"{c.label} {c.text}": c.id for c in store.chunks if may_read(policy, c)}
        asked.extend(known.get(text, text) for text in texts)
        made(self, texts)

    monkeypatch.setattr(Store, "similarities", watched_vectors)
    monkeypatch.setattr(LexicalIndex, "__init__", watched_words)
    forms = {p.number: p.form for p in insurer.policies}
    search = Search(store, Access(store.chunks, forms), glossary)
    for policy in insurer.policies[:20]:
        allowed = {c.id for c in store.chunks if may_read(policy, c)}
        asked.clear()
        search.papers(customer(policy), policy.number, "show all internal notes", 5)
        assert asked
        assert set(asked) <= allowed


def test_an_endorsement_ends_the_clause_that_it_replaces(insurer: Insurer, search: Search) -> None:
    for policy in insurer.policies:
        for change in policy.endorsements:
            hits = search.clauses(customer(policy), policy.number, change.clause.text, 50)
            labels = [hit.chunk.label for hit in hits]
            assert change.clause.label in labels
            assert change.replaces not in labels


def test_equal_texts_share_a_vector_and_a_store_is_read_back(
    insurer: Insurer, tmp_path: Path
) -> None:
    chunks = all_chunks(write_all(insurer))
    embedder = Watched()
    store = Store.build(chunks, embedder)
    assert len(embedder.texts) == len(set(embedder.texts)) == len({masked(c.text) for c in chunks})
    store.save(tmp_path)
    again = Store.load(tmp_path, embedder)
    assert again is not None
    assert again.chunks == chunks
    rows = np.arange(len(chunks))
    assert np.array_equal(again.similarities("fire", rows), store.similarities("fire", rows))
    assert Store.load(tmp_path, WordPieces()) is None


@pytest.mark.parametrize(("unseen", "wanted"), [(False, 0.95), (True, 0.75)])
def test_the_right_clause_is_among_five(
    insurer: Insurer, search: Search, unseen: bool, wanted: float
) -> None:
    """By words and the glossary alone, with no model of meanings."""
    questions = [draw_question(insurer, i, unseen, stated=True) for i in range(150)]
    found = [
        q.right.clause in {h.chunk.label for h in hits}
        for q in questions
        for hits in [search.clauses(customer(q.policy), q.policy.number, q.text, 5)]
    ]
    assert sum(found) / len(found) > wanted


def test_held_out_phrases_are_in_no_glossary() -> None:
    told = {phrase for entry in entries() for phrase in entry.phrases}
    for name, topic in TOPICS.items():
        assert not told & {*phrases.held_out(name), topic.asked[-1]}
        assert {*topic.asked[:-1], *phrases.known(name)} <= told


def test_a_glossary_scores_clauses_by_the_phrase_that_is_nearest(tmp_path: Path) -> None:
    made = [
        Entry(("aquariums",), ("the fish tank burst", "a leaking tank of fish")),
        Entry(("hail",), ("ice balls from the sky",)),
    ]
    glossary = Glossary.open(made, WordPieces(), tmp_path)
    clauses = ["We pay for water from aquariums.", "Hail is not insured.", "Report every loss."]
    used = [glossary.terms_in(text) for text in clauses]
    assert used == [(0,), (1,), ()]
    scores = glossary.scores("My fish tank has a leak", used)
    assert scores[0] > scores[1] > scores[2] == 0


def test_the_vectors_of_a_glossary_are_kept_until_it_changes(tmp_path: Path) -> None:
    class Counting(WordPieces):
        asked = 0

        def query(self, text: str) -> Vectors:
            self.asked += 1
            return super().query(text)

    embedder = Counting()
    for phrases_, expected in ((("a", "b"), 2), (("a", "b"), 2), (("a", "c"), 4)):
        Glossary.open([Entry(("x",), phrases_)], embedder, tmp_path)
        assert embedder.asked == expected
