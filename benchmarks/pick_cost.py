"""What a pick costs, by policy, replicas and gateway processes: microseconds a request.

python benchmarks/pick_cost.py
"""

from __future__ import annotations

import json
import random
import timeit

from millrace.gateway.ask import Ask, read_ask
from millrace.gateway.board import Board
from millrace.gateway.message import Request
from millrace.gateway.picker import POLICIES, make_picker
from millrace.gateway.prefixes import PrefixTable
from millrace.gateway.replicas import Member, ReplicaSet
from millrace.http1 import Target

PICKS = 500


def asks() -> list[Ask]:
    """Requests of 4 KB, an eighth of each from one of eight texts."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=512)) for _ in range(8)]
    made = []
    for _ in range(64):
        rest = "".join(draw.choices("abcdefgh ", k=3500))
        body = json.dumps({"model": "m", "prompt": draw.choice(texts) + rest}).encode()
        made.append(read_ask(Request(b"POST", b"/v1/completions", "1.1", [], body, True)))
    return made


def cost(policy: str, count: int, processes: int) -> float:
    """Least mean of seven runs, in microseconds."""
    board = Board(processes)
    fleet = ReplicaSet(board, board.part(0), lambda id, reason: None)
    fleet.apply(
        Member(id=i, slot=i, target=Target("10.0.0.1", 8000 + i), state="up") for i in range(count)
    )
    picker = make_picker(policy, fleet, PrefixTable(board.prefixes))
    able, some = fleet.available(), asks()

    def picks() -> None:
        for number in range(PICKS):
            picker.pick(able, some[number % 64])

    return min(timeit.repeat(picks, number=1, repeat=7)) / PICKS * 1e6


def main() -> None:
    for count, processes in ((3, 1), (8, 4), (96, 12)):
        row = {policy: round(cost(policy, count, processes), 1) for policy in POLICIES}
        print(f"{count} replicas, {processes} processes: {json.dumps(row)}")


if __name__ == "__main__":
    main()
