"""Messages of rank 0 as bytes: decoded unchanged, and only in their order."""

from __future__ import annotations

import pytest

from millrace.protocol import StepPlan, StopRanks
from millrace.runtime.ranks.plan_codec import (
    FIRST_BYTES,
    MeasureAllReduce,
    Message,
    PlanCodec,
    PlanMismatchError,
)


def transferred(message: Message, sender: PlanCodec, receiver: PlanCodec) -> Message:
    """The message as the other rank decodes it; a long one is sent in two parts."""
    data = bytes(sender.pack(message))
    # Behind a short message the buffer holds bytes of earlier ones.
    first = data[:FIRST_BYTES].ljust(FIRST_BYTES, b"\xff")
    rest = receiver.remaining_bytes(first)
    assert rest == max(0, len(data) - FIRST_BYTES)
    return receiver.unpack(first + data[FIRST_BYTES : FIRST_BYTES + rest])


@pytest.mark.parametrize("rows", [0, 1, 400, 2030, 2031, 9000])
def test_messages_of_every_length_arrive(rows: int) -> None:
    sender, receiver = PlanCodec(), PlanCodec()
    messages = [MeasureAllReduce([1] * rows), StopRanks(), MeasureAllReduce([70000] * rows)]
    assert [transferred(message, sender, receiver) for message in messages] == messages
    assert receiver.number == sender.number == 3


def test_a_missed_message_is_noticed() -> None:
    sender, receiver = PlanCodec(), PlanCodec()
    transferred(MeasureAllReduce([1]), sender, receiver)
    sender.pack(StopRanks())
    with pytest.raises(PlanMismatchError, match=r"^2 where rank 0 has 3$"):
        transferred(StopRanks(), sender, receiver)


def test_a_changed_byte_is_noticed() -> None:
    sender, receiver = PlanCodec(), PlanCodec()
    plan = StepPlan(1, [], [], [1, 2, 3], [], [], 9)
    data = sender.pack(plan)
    data[-1] ^= 1
    with pytest.raises(PlanMismatchError, match=r"^1 with digest .* where rank 0 has "):
        receiver.unpack(bytes(data))


def test_the_digest_covers_earlier_messages() -> None:
    sender, receiver = PlanCodec(), PlanCodec()
    sender.pack(MeasureAllReduce([1]))
    receiver.pack(MeasureAllReduce([2]))
    with pytest.raises(PlanMismatchError, match="digest"):
        transferred(StopRanks(), sender, receiver)
