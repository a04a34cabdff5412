"""The search: vectors, words and the glossary over the asker's rows, their ranks fused.

Answers on cover come from clauses. Letters and schedules say nothing on cover, and internal papers
are no part of the contract: they are found when they are asked for (`papers`), not for a decision.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from examples.insurance.retrieval.access import Access, Asker
from examples.insurance.retrieval.chunks import Chunk
from examples.insurance.retrieval.glossary import Glossary
from examples.insurance.retrieval.lexical import LexicalIndex
from examples.insurance.retrieval.ranks import reciprocal, reciprocal_of_shared
from examples.insurance.retrieval.store import Rows, Store

CONTRACT = frozenset({"conditions", "endorsement"})
GLOSSARY_WEIGHT = 2  # it knows what a clause is about; vectors and words see all of its text
CACHED_SCOPES = 256


@dataclass(frozen=True, slots=True)
class Hit:
    """similarity: the cosine of chunk and question; shares: whether they have a word in common;
    on_subject: whether a clause uses a term for what the question is about."""

    chunk: Chunk
    score: float
    similarity: float
    shares: bool
    on_subject: bool


@dataclass(frozen=True, slots=True)
class _Scope:
    """terms: of each row's clause, by the glossary; none of papers, whose words find them."""

    rows: Rows
    index: LexicalIndex
    terms: list[tuple[int, ...]]


class Search:
    def __init__(self, store: Store, access: Access, glossary: Glossary) -> None:
        self._store, self.access, self._glossary = store, access, glossary
        self._scopes: OrderedDict[tuple[Asker, str, bool], _Scope | None] = OrderedDict()

    def clauses(self, asker: Asker, policy: str, question: str, count: int) -> list[Hit]:
        """The clauses of the contract that are nearest to a question, those first whose terms the
        glossary finds nearest."""
        return self._best(self._scope(asker, policy, contract=True), question, count)

    def papers(self, asker: Asker, policy: str, question: str, count: int) -> list[Hit]:
        """The same among all papers on a policy that the asker may see."""
        return self._best(self._scope(asker, policy, contract=False), question, count)

    def _scope(self, asker: Asker, policy: str, contract: bool) -> _Scope | None:
        """The asker is part of the key: a scope is never handed to another role or policy."""
        key = (asker, policy, contract)
        if key not in self._scopes:
            self._scopes[key] = self._made(asker, policy, contract)
            if len(self._scopes) > CACHED_SCOPES:
                self._scopes.popitem(last=False)
        self._scopes.move_to_end(key)
        return self._scopes[key]

    def _made(self, asker: Asker, policy: str, contract: bool) -> _Scope | None:
        chunks = self._store.chunks
        rows = self.access.rows(asker, policy)
        if contract:
            rows = np.array([r for r in rows if chunks[r].kind in CONTRACT], dtype=np.int64)
        if not len(rows):
            return None
        index = LexicalIndex([f"{chunks[r].label} {chunks[r].text}" for r in rows])
        terms = [self._glossary.terms_in(chunks[r].text) if contract else () for r in rows]
        return _Scope(rows, index, terms)

    def _best(self, scope: _Scope | None, question: str, count: int) -> list[Hit]:
        if scope is None:
            return []
        similar = self._store.similarities(question, scope.rows)
        shared = scope.index.scores(question)
        told = self._glossary.scores(question, scope.terms)
        fused = reciprocal(similar) + reciprocal_of_shared(shared)
        fused += GLOSSARY_WEIGHT * reciprocal_of_shared(told)
        subject = self._glossary.subject(question)
        best = np.argsort(-fused, kind="stable")[:count]
        return [
            Hit(
                self._store.chunks[scope.rows[i]], float(fused[i]), float(similar[i]),
                bool(shared[i] > 0), subject in scope.terms[i],
            )
            for i in sorted(best, key=lambda i: -told[i])
        ]  # fmt: skip
