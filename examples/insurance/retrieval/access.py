"""Who may see which chunks. The one place that decides it.

An asker comes from the server's session, never from a request's body nor from a model's words.
Rows are chosen before anything is scored, in both halves of the search.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from examples.insurance.retrieval.chunks import Chunk
from examples.insurance.retrieval.store import Rows

Role = Literal["customer", "operator"]


@dataclass(frozen=True, slots=True)
class Asker:
    """role: what the session says. policy: a customer's own; "" of operators."""

    role: Role
    policy: str = ""


class Access:
    """The rows of chunks by policy and by form. forms: each policy's form in force."""

    def __init__(self, chunks: Sequence[Chunk], forms: dict[str, str]) -> None:
        self._chunks, self.forms = chunks, forms
        self._of_policy: dict[str, list[int]] = defaultdict(list)
        self._of_form: dict[str, list[int]] = defaultdict(list)
        self._general: list[int] = []
        for row, chunk in enumerate(chunks):
            if chunk.policy:
                self._of_policy[chunk.policy].append(row)
            elif chunk.form:
                self._of_form[chunk.form].append(row)
            else:
                self._general.append(row)

    def may_see(self, asker: Asker, chunk: Chunk) -> bool:
        """Whether the asker may read a chunk at all."""
        if asker.role == "operator":
            return True
        if asker.role != "customer" or chunk.internal or asker.policy not in self.forms:
            return False
        if chunk.policy:
            return chunk.policy == asker.policy
        return chunk.form == self.forms[asker.policy]

    def rows(self, asker: Asker, policy: str) -> Rows:
        """What a question of the asker on a policy is answered from: the clauses in force.

        For operators with the policy's notes and claims, and the guidelines.
        """
        if policy not in self.forms:
            return np.array([], dtype=np.int64)
        own = self._of_policy[policy]
        replaced = {self._chunks[row].replaces for row in own} - {""}
        form = [
            row
            for row in self._of_form[self.forms[policy]]
            if self._chunks[row].label not in replaced
        ]
        rows = (*own, *form, *self._general)
        return np.array([r for r in rows if self.may_see(asker, self._chunks[r])], dtype=np.int64)
