"""The insurer's glossary: what its terms are called by those who ask.

A clause says "water that escapes from aquariums", a customer "the fish tank burst". For each term
that clauses use, the glossary has everyday phrases. A question is compared with the phrases, and a
clause that uses a term scores as the nearest phrase of that term does.

It holds no documents, so it is the same for every asker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.insurance.retrieval.embeddings import Embedder, Vectors

AVERAGED = 2  # phrases: one alone may be near by chance


@dataclass(frozen=True, slots=True)
class Entry:
    """terms: as clauses write them; phrases: as people do."""

    terms: tuple[str, ...]
    phrases: tuple[str, ...]


class Glossary:
    """vectors: of all phrases, entry after entry."""

    def __init__(self, entries: Sequence[Entry], embedder: Embedder, vectors: Vectors) -> None:
        self._entries, self._embedder, self._vectors = entries, embedder, vectors
        self._ends = np.cumsum([0, *(len(entry.phrases) for entry in entries)])

    @classmethod
    def open(cls, entries: Sequence[Entry], embedder: Embedder, folder: Path) -> Glossary:
        """Its vectors come from the folder if they are of these phrases, else go there."""
        phrases, file = phrases_of(entries), folder / "glossary.npz"
        key = hashlib.sha256("\n".join([embedder.name, *phrases]).encode()).hexdigest()
        if file.exists():
            found = np.load(file)
            if str(found["key"]) == key:
                return cls(entries, embedder, found["vectors"])
        vectors = np.stack([embedder.query(phrase) for phrase in phrases])
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file, vectors=vectors, key=key)
        return cls(entries, embedder, vectors)

    def terms_in(self, text: str) -> tuple[int, ...]:
        """The entries whose terms a clause uses."""
        low = text.lower()
        used = enumerate(self._entries)
        return tuple(n for n, e in used if any(term.lower() in low for term in e.terms))

    def scores(self, question: str, used: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
        """One score a clause, 0 for one without a term. used: `terms_in` of each clause."""
        near = self._nearness(question)
        return np.array([max((near[n] for n in terms), default=0.0) for terms in used])

    def subject(self, question: str) -> int:
        """The number of the entry that the question is about."""
        return int(np.argmax(self._nearness(question)))

    def _nearness(self, question: str) -> NDArray[np.float64]:
        """Of each entry: the mean cosine of its AVERAGED nearest phrases, from 0 to 2."""
        similar = 1 + self._vectors @ self._embedder.query(question)
        return np.array([
            np.sort(similar[first:end])[-AVERAGED:].mean()
            for first, end in zip(self._ends, self._ends[1:], strict=False)
        ])  # fmt: skip


def phrases_of(entries: Sequence[Entry]) -> list[str]:
    return [phrase for entry in entries for phrase in entry.phrases]
