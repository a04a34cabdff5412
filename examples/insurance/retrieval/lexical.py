"""The lexical half of the search: BM25 over a few chunks, for the words that vectors miss.

An index is made of the chunks that one asker may see and of no others, so that neither a score nor
the statistics behind it know of anything else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import bm25s
import numpy as np
from numpy.typing import NDArray

COMMON = frozenset(
    """a an and am any are as at be by can case do does first for from have help i if in is it me my
    no not of on or our pay policy problem that the there this to us was we what which who will
    would you your cover covered covers insured against loss claim happens""".split()  # noqa: SIM905
)


def words(text: str) -> list[str]:
    """Lower case, plurals as singulars; clause numbers and references are words too."""
    found = re.findall(r"[a-z]+-\d+|\d+(?:\.\d+)?|[a-z]+", text.lower())
    return [w.removesuffix("s") if len(w) > 3 else w for w in found if w not in COMMON]


class LexicalIndex:
    def __init__(self, texts: Sequence[str]) -> None:
        corpus = [words(text) or ["-"] for text in texts]
        self._index = bm25s.BM25()
        self._index.index(corpus, show_progress=False)
        self._known = {word for text in corpus for word in text}

    def scores(self, query: str) -> NDArray[np.float32]:
        """One score a text, 0 where no word is shared."""
        asked = [word for word in words(query) if word in self._known]
        if not asked:
            return np.zeros(self._index.scores["num_docs"], dtype=np.float32)
        return np.asarray(self._index.get_scores(asked), dtype=np.float32)
