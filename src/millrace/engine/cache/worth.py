"""What a snapshot is worth: the time that it saves, times the chance of that, for its memory.

* Time: the tokens between the snapshot and the next one above it. A prompt that finds the snapshot
  gone resumes there and computes these tokens again.
* Chance: a conversation that came back comes back; so each use counts, and the next turn takes over
  the uses of the turn before. What lies above another snapshot is needed by branches only: by those
  that there were, such as conversations of one system prompt. (If a template drops reasoning from
  history, every next turn is such a branch; that is learned, too.) Snapshots without uses have the
  chance that others had, of the same kind and whose prompts begin alike: calls of a title generator
  never come back, and soon count for little. A prompt that would have used a snapshot counts also
  if that was evicted. The chance falls with the time since the last use.
* Memory: the snapshot, and the pages that only it needs.

What a client has asked to keep, for a time, goes last. Who has more than an equal share of the
snapshots (by cache salt) has less of each.
"""

from __future__ import annotations

from collections.abc import Sequence

from millrace.engine.cache.policy import Kind
from millrace.engine.cache.tree import Lost, Node, Rates

ALIKE_PAGES = 4  # prompts that begin with the same pages, so many, come back alike
# Chances before anything is known. TURNS: of the first one, which is often a system prompt.
EXPECTED = {Kind.TURNS: 0.25, Kind.PROMPT: 0.25, Kind.ANSWER: 0.5}
BRANCH = 0.02  # that someone goes back to a turn that was continued
LIVE = 4.0  # how much likelier the next use is right after an answer than later
WEIGHT = 4.0  # observations that an expectation counts as
PINNED = 1e6  # how much more a snapshot is worth that a client has asked to keep
PATIENCE = 60.0  # seconds in which the chance of a fresh snapshot halves


class Worth:
    """Ranks snapshots. page_cost: memory of a page as a share of a snapshot's."""

    def __init__(self, page_size: int, page_cost: float) -> None:
        self._page_size = page_size
        self._page_cost = page_cost
        self._by_salt: dict[str, int] = {}
        self.total = 0

    # --- what is observed -------------------------------------------------------------------

    def added(self, node: Node, path: Sequence[Node]) -> None:
        """A snapshot was made at the end of the path, which is its last node."""
        node.alike, node.returned = _alike(path), False
        node.alike.made[node.kind.value] += 1
        self._by_salt[node.salt] = self._by_salt.get(node.salt, 0) + 1
        self.total += 1

    def used(self, node: Node) -> None:
        """A prompt resumed there."""
        assert node.alike is not None
        if node.below:
            node.branches += 1
        else:
            node.uses += 1
        node.alike.used[node.kind.value] += not node.returned
        node.returned = True

    def missed(self, lost: Lost) -> None:
        """A prompt would have resumed there."""
        lost.uses += 1
        lost.alike.used[lost.kind.value] += not lost.returned
        lost.returned = True

    def removed(self, node: Node) -> None:
        self._by_salt[node.salt] -= 1
        if not self._by_salt[node.salt]:
            del self._by_salt[node.salt]
        self.total -= 1

    # --- worth ------------------------------------------------------------------------------

    def chance(self, node: Node) -> float:
        """Of a use, were it fresh."""
        system_prompt = node.kind is Kind.TURNS and node.above is not None and not node.above.depth
        superseded = bool(node.below) and not system_prompt
        seen = node.branches + (0 if superseded else node.uses)
        if superseded and (node.returned or node.kind is Kind.ANSWER):
            expected = BRANCH
        else:
            expected = self._learned(node, BRANCH if superseded else EXPECTED[node.kind])
        return (seen + WEIGHT * expected) / (seen + WEIGHT)

    def of_new_answer(self, tokens: int, rates: Rates | None) -> float:
        """What the snapshot of an answer would be worth that saves so many tokens. rates: of the
        prompts that begin alike, if there were any."""
        kind, known = Kind.ANSWER.value, rates or Rates()
        chance = (WEIGHT * EXPECTED[Kind.ANSWER] + known.used[kind]) / (WEIGHT + known.made[kind])
        memory = 1.0 + self._page_cost * tokens / self._page_size
        return LIVE * tokens * chance / (PATIENCE * memory)

    def _learned(self, node: Node, expected: float) -> float:
        """The share of snapshots like this one that were ever used."""
        assert node.alike is not None
        made, used = node.alike.made[node.kind.value], node.alike.used[node.kind.value]
        return (WEIGHT * expected + used) / (WEIGHT + made)

    def of(self, node: Node, now: float, for_pages: bool) -> float:
        """Worth of a node's snapshot. for_pages: pages are short, so only these count as memory."""
        assert node.above is not None
        saved = node.depth - node.above.depth
        own_pages = 0 if node.below else saved / self._page_size
        memory = max(own_pages, 1.0) if for_pages else 1.0 + self._page_cost * own_pages
        age = max(0.0, now - node.used_at) + PATIENCE
        share = self._by_salt[node.salt] * len(self._by_salt) / max(1, self.total)
        worth = saved * self.chance(node) / (age * memory * max(1.0, share))
        return worth * PINNED if node.pinned_until > now else worth


def _alike(path: Sequence[Node]) -> Rates:
    """The rates of the prompts that begin as the path does."""
    node = alike_node(path)
    if node.rates is None:
        node.rates = Rates()
    return node.rates


def alike_node(path: Sequence[Node]) -> Node:
    """The node that stands for the prompts that begin as the path does."""
    return path[min(ALIKE_PAGES, len(path)) - 1]
