"""Reads a stream of /v1/responses and checks it against OpenAI's own types and rules."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pydantic
from openai.types.responses import Response, ResponseStreamEvent

_EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
_DELTAS = {
    "response.output_text": "text",
    "response.reasoning_text": "text",
    "response.function_call_arguments": "arguments",
    "response.custom_tool_call_input": "input",
}
ENDS = ("response.completed", "response.incomplete", "response.failed")


def read_events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each of which is one that the type allows."""
    events = []
    for block in answer.text.split("\n\n"):
        if not block:
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        _EVENT.validate_python(event)
        events.append(event)
    return events


def checked(events: list[dict[str, Any]], begins: tuple[str, ...] = ()) -> dict[str, Any]:
    """The final response of a whole stream, once its events are found to agree with it.

    begins: the first events, if they are not those of a response in the foreground.
    """
    begins = begins or ("response.created", "response.in_progress")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert tuple(event["type"] for event in events[: len(begins)]) == begins
    assert events[-1]["type"] in ENDS
    final: dict[str, Any] = events[-1]["response"]
    Response.model_validate(final)
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events[len(begins) : -1]:
        kind, _, action = event["type"].rpartition(".")
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(items)
            assert event["item"].get("status", "in_progress") == "in_progress"
            items.append(event["item"])
            texts.append("")
            continue
        index = event["output_index"]
        assert index == len(items) - 1  # one item after the other
        if event["type"] == "response.output_item.done":
            assert event["item"]["id"] == items[index]["id"]
            items[index] = event["item"]
        elif action == "delta":
            assert event["item_id"] == items[index]["id"]
            assert event["delta"]
            texts[index] += event["delta"]
        elif kind in _DELTAS:
            assert event[_DELTAS[kind]] == texts[index]
        else:
            assert kind == "response.content_part"
    assert items == final["output"]
    assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}
    return final
