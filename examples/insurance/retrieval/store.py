"""All chunks with their vectors, on disk: what a start reads, and what a build has written.

`Store` knows nothing of askers: who may see what is `access.py`'s. It answers exactly, by NumPy,
which is fast up to some 200,000 chunks; docs/insurance.md shows the same interface on pgvector
and Qdrant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from examples.insurance.retrieval.chunks import Chunk
from examples.insurance.retrieval.embeddings import Embedder, Vectors, masked

Rows = NDArray[np.int64]
BATCH = 64


class Store:
    """chunks: all. Equal texts share a vector: `vector_of` is each chunk's row in `vectors`."""

    def __init__(
        self, chunks: list[Chunk], vectors: Vectors, vector_of: Rows, embedder: Embedder
    ) -> None:
        self.chunks, self.embedder = chunks, embedder
        self._vectors, self._vector_of = vectors, vector_of
        self.by_id = {chunk.id: row for row, chunk in enumerate(chunks)}

    @classmethod
    def build(cls, chunks: list[Chunk], embedder: Embedder) -> Store:
        texts: dict[str, int] = {}
        of = [texts.setdefault(masked(c.text), len(texts)) for c in chunks]
        vectors = np.concatenate([embedder.passages(part) for part in _batches(list(texts))])
        return cls(chunks, vectors, np.array(of), embedder)

    def similarities(self, question: str, rows: Rows) -> NDArray[np.float32]:
        """The cosine of the question with each of the rows, and with no other chunk."""
        needed, at = np.unique(self._vector_of[rows], return_inverse=True)
        scores: NDArray[np.float32] = self._vectors[needed] @ self.embedder.query(question)
        return scores[at]

    # --- files -------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """The name of the embedder is written last: a build that was cut short counts as none."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = b"\n".join(map(msgspec.json.encode, self.chunks))
        (folder / "chunks.jsonl").write_bytes(lines)
        np.savez(folder / "vectors.npz", vectors=self._vectors, vector_of=self._vector_of)
        (folder / "embedder").write_text(self.embedder.name)

    @classmethod
    def load(cls, folder: Path, embedder: Embedder) -> Store | None:
        """None where there is no store of this embedder."""
        made_by = folder / "embedder"
        if not made_by.exists() or made_by.read_text() != embedder.name:
            return None
        lines = (folder / "chunks.jsonl").read_bytes().split(b"\n")
        chunks = [msgspec.json.decode(line, type=Chunk) for line in lines]
        arrays = np.load(folder / "vectors.npz")
        return cls(chunks, arrays["vectors"], arrays["vector_of"], embedder)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(texts), BATCH):
        yield texts[first : first + BATCH]
