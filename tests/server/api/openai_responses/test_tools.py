"""Custom tools and namespaces, as agents send them, by the official client.

The fake engine echoes the prompt up to the user's turn end, so the user's words are the answer.
"""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.api.openai_responses.response_events import checked, read_events
from tests.server.api.openai_responses.test_store import prompt_tokens, respond
from tests.server.api.test_choices import events

PATCH: Any = {"type": "custom", "name": "apply_patch", "description": "Edits files."}
FILES: Any = {
    "type": "namespace",
    "name": "files",
    "description": "Of this disk.",
    "tools": [
        {"type": "function", "name": "read", "parameters": {"type": "object"}},
        {"type": "custom", "name": "write"},
    ],
}
TOOLS = [PATCH, FILES]


def call(name: str, text: str | None = None) -> str:
    inner = "" if text is None else f"<parameter=input>\n{text}\n</parameter>\n"
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


TEXT = '*** Begin\n+ "a" \\n 🦊\n\n*** End'
WORDS = "</think>\n" + "\n".join(
    (call("apply_patch", TEXT), call("files__read"), call("files__write", "x"))
)


def told(output: Any) -> list[tuple[Any, ...]]:
    return [
        (
            item["type"],
            item["name"],
            item.get("namespace"),
            item["input"] if item["type"] == "custom_tool_call" else item["arguments"],
        )
        for item in output
        if item["type"].endswith("_call")
    ]


CALLS = [
    ("custom_tool_call", "apply_patch", None, TEXT),
    ("function_call", "read", "files", "{}"),
    ("custom_tool_call", "write", "files", "x"),
]


def test_calls_name_their_tools_as_the_client_did(http: httpx.Client) -> None:
    body = {"input": WORDS, "tools": TOOLS}
    whole = http.post("/v1/responses", json=body).json()
    assert told(whole["output"]) == CALLS
    events = read_events(http.post("/v1/responses", json={**body, "stream": True}))
    assert told(checked(events)["output"]) == CALLS
    kinds = [event["type"] for event in events]
    assert kinds.count("response.custom_tool_call_input.done") == 2
    assert kinds.count("response.custom_tool_call_input.delta") > 5  # as the text comes
    assert kinds.count("response.function_call_arguments.done") == 1


def test_the_clients_types_know_the_calls(client: openai.OpenAI) -> None:
    response = respond(client, WORDS, tools=TOOLS)
    calls: Any = [item for item in response.output if item.type.endswith("_call")]
    assert [type(item).__name__ for item in calls] == [
        "ResponseCustomToolCall",
        "ResponseFunctionToolCall",
        "ResponseCustomToolCall",
    ]
    results: Any = [
        {"type": f"{item.type}_output", "call_id": item.call_id, "output": "done"} for item in calls
    ]
    again = respond(client, results, previous_response_id=response.id, tools=TOOLS)
    sent = [{"role": "user", "content": WORDS}, *response.output, *results]
    assert prompt_tokens(again) == prompt_tokens(respond(client, sent, tools=TOOLS))


def test_a_call_that_is_cut_off_has_what_came(http: httpx.Client) -> None:
    body = {"input": "</think>\n" + call("apply_patch", "spät " * 40), "tools": TOOLS}
    cut = {**body, "max_output_tokens": 100}
    whole = http.post("/v1/responses", json=cut).json()
    last = whole["output"][-1]
    assert last["status"] == "incomplete"
    assert last["input"].startswith("spät spät")
    events = read_events(http.post("/v1/responses", json={**cut, "stream": True}))
    assert checked(events)["output"][-1]["input"] == last["input"]


@pytest.mark.parametrize(
    ("choice", "refused"),
    [
        ({"type": "custom", "name": "apply_patch"}, ""),
        ({"type": "function", "name": "read"}, ""),
        ({"type": "function", "name": "files__read"}, ""),
        ({"type": "custom", "name": "never"}, "names never"),
        ({"type": "allowed_tools", "mode": "auto",
          "tools": [{"type": "namespace", "name": "files"}, {"type": "custom", "name": "write"}]},
         ""),
        ({"type": "allowed_tools", "mode": "required", "tools": []}, "needs tools"),
    ],
)  # fmt: skip
def test_tools_can_be_chosen(http: httpx.Client, choice: Any, refused: str) -> None:
    body = {"input": "hi", "tools": TOOLS, "tool_choice": choice, "max_output_tokens": 2}
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == (400 if refused else 200)
    assert not refused or refused in answer.json()["error"]["message"]


def test_a_search_that_is_offered_beside_other_tools_is_left_out(http: httpx.Client) -> None:
    """As Codex offers it; a choice of it is refused."""
    search = {"type": "web_search", "external_web_access": False}
    body = {"input": "hi", "tools": [PATCH, search], "max_output_tokens": 2}
    whole, alone = (
        http.post("/v1/responses", json={**body, "tools": tools})
        for tools in ([PATCH, search], [PATCH])
    )
    assert whole.status_code == 200
    assert whole.json()["usage"]["input_tokens"] == alone.json()["usage"]["input_tokens"]
    chosen = http.post("/v1/responses", json={**body, "tool_choice": {"type": "web_search"}})
    assert chosen.status_code == 400


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "namespace", "name": "a"}], "a namespace needs a name and a list of tools"),
        ([{"type": "namespace", "name": "a", "tools": [{"type": "mcp"}]}], "tools[0].tools[0]"),
        ([PATCH, PATCH], "two functions called apply_patch"),
        ([{"type": "web_search"}], "the server runs no tools such as 'web_search'"),
        ([{**PATCH, "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}}],
         "not a token of this model"),
    ],
)  # fmt: skip
def test_wrong_tools_are_refused(http: httpx.Client, tools: Any, message: str) -> None:
    answer = http.post("/v1/responses", json={"input": "hi", "tools": tools})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


# --- the same tools in chats --------------------------------------------------------------------

CHAT_TOOLS: Any = [
    {"type": "custom", "custom": {"name": "apply_patch", "description": "Edits files."}},
    {"type": "function", "function": {"name": "read"}},
]
CHAT_WORDS = "</think>\n" + call("apply_patch", TEXT) + call("read") + call("apply_patch", "x")


def test_a_chat_calls_custom_tools_too(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": CHAT_WORDS}]
    answer = client.chat.completions.create(model="fake", messages=messages, tools=CHAT_TOOLS)
    message = answer.choices[0].message
    calls: Any = message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [one.type for one in calls] == ["custom", "function", "custom"]
    assert [one.custom.input for one in calls if one.type == "custom"] == [TEXT, "x"]
    assert calls[0].custom.name == "apply_patch"
    results = [{"role": "tool", "tool_call_id": one.id, "content": "done"} for one in calls]
    again = client.chat.completions.create(
        model="fake", messages=[*messages, message, *results], tools=CHAT_TOOLS
    )
    assert again.choices[0].finish_reason == "tool_calls"


def test_a_chat_streams_the_input_of_custom_tools(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": CHAT_WORDS}]
    body = {"messages": messages, "tools": CHAT_TOOLS, "stream": True}
    texts: dict[int, str] = {}
    kinds: dict[int, str] = {}
    parts = 0
    for chunk in events(http, "/v1/chat/completions", body):
        for one in chunk["choices"][0]["delta"].get("tool_calls", ()):
            if "type" in one:
                kinds[one["index"]] = one["type"]
                assert one["id"]
            inner = one.get("custom") or {"input": one.get("function", {}).get("arguments")}
            texts[one["index"]] = texts.get(one["index"], "") + inner["input"]
            parts += "custom" in one
    assert kinds == {0: "custom", 1: "function", 2: "custom"}
    assert texts == {0: TEXT, 1: "{}", 2: "x"}
    assert parts > 10  # as the text comes


def test_a_wrong_custom_call_in_a_history_is_refused(http: httpx.Client) -> None:
    for wrong in (None, {"name": 3}, {"name": "a", "input": 4}):
        calls = [{"id": "c", "type": "custom", "custom": wrong}]
        history = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}]
        answer = http.post("/v1/chat/completions", json={"messages": history, "tools": CHAT_TOOLS})
        assert answer.status_code == 400
        assert "messages[1].tool_calls[0] must be" in answer.json()["error"]["message"]
