"""What is evicted is what is worth least: who comes back stays, and calls that never do go."""

from __future__ import annotations

import random

from millrace.engine.cache.policy import Kind
from millrace.engine.cache.pool import Pool
from millrace.engine.cache.snapshot_tree import SnapshotTree

PAGE = 4


class Client:
    """Sends prompts to a tree as the scheduler does, and counts what is computed again."""

    def __init__(self, snapshots: int, pages: int = 100_000, page_cost: float = 0.01) -> None:
        self.pages = Pool(pages, first=1)
        self.tree = SnapshotTree(PAGE, self.pages, snapshots, page_cost=page_cost)

    def send(self, prompt: list[int], answer: list[int], at: float, salt: str = "") -> int:
        """A request: a snapshot at the end of its prompt, one of its answer. Returns the tokens of
        the prompt that were computed."""
        self.tree.now = at
        found = self.tree.match(prompt, salt)
        self.tree.record_prompt(prompt, salt)
        whole = [*prompt, *answer]
        own = self.pages.allocate(-(-len(whole) // PAGE))
        end = (len(prompt) - 1) // PAGE * PAGE
        if end > found.tokens:
            self._publish(prompt[:end], own, salt, Kind.PROMPT)
        self._publish(whole[:-1], own, salt, Kind.ANSWER)
        for page in own:
            self.pages.release(page)
        return len(prompt) - found.tokens

    def _publish(self, tokens: list[int], own: list[int], salt: str, kind: Kind) -> None:
        snapshot = self.tree.begin_save(tokens, salt, kind=kind)
        if snapshot is not None:
            self.tree.publish(tokens, own, snapshot, salt, kind=kind)


def text(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000) for _ in range(count)]


def test_auxiliary_calls_cannot_drain_a_long_conversation() -> None:
    """Six conversations, eight snapshots, and 40 calls of a title generator between two turns."""
    rng = random.Random(1)
    client = Client(snapshots=8)
    system, title = text(rng, 40), text(rng, 40)
    lines = [[*system, *text(rng, 2000)] for _ in range(6)]
    clock, recomputed, new = 0.0, 0, 0
    for turn in range(6):
        for number, line in enumerate(lines):
            answer = text(rng, 30)
            computed = client.send(line, answer, clock)
            if turn:
                recomputed, new = recomputed + computed, new + 80
            lines[number] = [*line, *answer, *text(rng, 80)]
            clock += 2.0
            for _ in range(40):
                client.send([*title, *text(rng, 60)], text(rng, 8), clock)
                clock += 0.1
    assert recomputed <= 1.5 * new
    client.tree.check()


def test_calls_of_one_kind_that_never_return_lose_their_worth() -> None:
    """Even long ones: after some, a fresh one is worth less than an older, shorter conversation
    that comes back."""
    rng = random.Random(2)
    client = Client(snapshots=4)
    system, other = text(rng, 16), text(rng, 16)
    line = [*system, *text(rng, 200)]
    for clock in range(30):
        answer = text(rng, 10)
        computed = client.send(line, answer, float(clock))
        line = [*line, *answer, *text(rng, 20)]
        if clock > 15:
            assert computed <= 21
        for _ in range(3):
            client.send([*other, *text(rng, 400)], text(rng, 10), float(clock))


def test_a_prompt_that_is_sent_again_and_again_stays() -> None:
    rng = random.Random(3)
    client = Client(snapshots=3)
    prompt = text(rng, 101)
    computed = [client.send([*prompt], text(rng, 5), float(i)) for i in range(3)]
    for i in range(20):
        client.send(text(rng, 101), text(rng, 5), 3.0 + i)
        computed.append(client.send([*prompt], text(rng, 5), 3.0 + i))
    assert computed[0] == 101
    assert set(computed[1:]) == {1}


def test_a_short_answer_does_not_take_the_place_of_a_prompt() -> None:
    rng = random.Random(9)
    client = Client(snapshots=3)
    prompts = [text(rng, 101) for _ in range(3)]
    for _ in range(2):
        for clock, prompt in enumerate(prompts):
            client.send(prompt, text(rng, 2), float(clock))
    assert [client.tree.cached(prompt) for prompt in prompts] == [100, 100, 100]


def test_one_salt_cannot_take_all_snapshots() -> None:
    """A client with many conversations leaves another one its share."""
    rng = random.Random(4)
    client = Client(snapshots=12)
    quiet = [text(rng, 200) for _ in range(3)]
    for line in quiet:
        client.send(line, [1] * 9, 0.0, "quiet")
    for i in range(60):
        client.send(text(rng, 250), text(rng, 9), 1.0 + i / 10, "busy")
    found = [client.tree.cached([*line, *[1] * 9, 7], "quiet") for line in quiet]
    assert min(found) >= 196


def test_old_conversations_go_in_the_end() -> None:
    rng = random.Random(5)
    client = Client(snapshots=2)
    old = text(rng, 1000)
    client.send(old, text(rng, 9), 0.0)
    for hour in range(1, 10):
        client.send(text(rng, 300), text(rng, 9), 3600.0 * hour)
    assert client.tree.cached([*old, 7]) == 0


def test_many_are_ranked_at_once_and_the_least_go_first() -> None:
    """With hundreds of snapshots, too, the shorter of equal prompts go before the longer ones."""
    rng = random.Random(6)
    client = Client(snapshots=250)
    short = [text(rng, 41) for _ in range(100)]
    long = [text(rng, 401) for _ in range(100)]
    for line in [*short, *long]:
        client.send(line, [1], 0.0)
    for _ in range(100):
        client.send(text(rng, 401), [1], 1.0)
    kept_long = sum(client.tree.cached([*line, 7]) > 0 for line in long)
    kept_short = sum(client.tree.cached([*line, 7]) > 0 for line in short)
    assert kept_long == 100
    assert kept_short <= 50
    client.tree.check()


def test_what_a_client_asks_to_keep_goes_last_until_its_time_is_over() -> None:
    client, rng = Client(snapshots=6), random.Random(4)
    line, others = text(rng, 400), [text(rng, 400) for _ in range(12)]
    client.send(line, [1, 2], 0.0)
    client.tree.pin([*line, 1], (0.0, 300.0))
    for number, other in enumerate(others):
        client.send(other, [1, 2], 1.0 + number)
    assert client.tree.cached([*line, 1, 2, 3]) == len(line) + 1
    for number, other in enumerate(others):
        client.send(other, [1, 2], 400.0 + number)
    assert client.tree.cached([*line, 1, 2, 3]) == 0


def test_at_most_half_of_all_can_be_asked_for() -> None:
    client, rng = Client(snapshots=6), random.Random(5)
    lines = [text(rng, 400) for _ in range(6)]
    for line in lines:
        client.send(line, [1, 2], 0.0)
        client.tree.pin([*line, 1], (300.0, 300.0))
    for number in range(12):
        client.send(text(rng, 400), [1, 2], 1.0 + number)
    kept = [client.tree.cached([*line, 1, 2, 3]) > 0 for line in lines]
    assert 2 <= sum(kept) <= 3
