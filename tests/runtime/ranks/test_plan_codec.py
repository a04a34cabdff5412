"""Messages of rank 0 as bytes: whole again on the other side, and in their order only."""

from __future__ import annotations

import pytest

from millrace.protocol import StepPlan, StopRanks
from millrace.runtime.ranks.plan_codec import FIRST, MeasureSums, Message, OtherPlanError, Plans


def carried(message: Message, there: Plans, here: Plans) -> Message:
    """The message after its way from one rank to another, in two pieces if it is long."""
    data = bytes(there.pack(message))
    first = data[:FIRST].ljust(FIRST, b"\xff")  # what stands behind a short message is old
    rest = here.rest(first)
    assert rest == max(0, len(data) - FIRST)
    return here.unpack(first + data[FIRST : FIRST + rest])


@pytest.mark.parametrize("rows", [0, 1, 400, 2030, 2031, 9000])
def test_messages_of_every_length_arrive(rows: int) -> None:
    there, here = Plans(), Plans()
    messages = [MeasureSums([1] * rows), StopRanks(), MeasureSums([70000] * rows)]
    assert [carried(message, there, here) for message in messages] == messages
    assert here.number == there.number == 3


def test_a_message_that_was_missed_is_noticed() -> None:
    there, here = Plans(), Plans()
    carried(MeasureSums([1]), there, here)
    there.pack(StopRanks())
    with pytest.raises(OtherPlanError, match=r"^2 where rank 0 has 3$"):
        carried(StopRanks(), there, here)


def test_a_message_with_another_byte_is_noticed() -> None:
    there, here = Plans(), Plans()
    plan = StepPlan(1, [], [], [1, 2, 3], [], [], 9)
    data = there.pack(plan)
    data[-1] ^= 1
    with pytest.raises(OtherPlanError, match=r"^1 with digest .* where rank 0 has "):
        here.unpack(bytes(data))


def test_what_came_before_is_part_of_the_digest() -> None:
    there, here = Plans(), Plans()
    there.pack(MeasureSums([1]))
    here.pack(MeasureSums([2]))
    with pytest.raises(OtherPlanError, match="digest"):
        carried(StopRanks(), there, here)
