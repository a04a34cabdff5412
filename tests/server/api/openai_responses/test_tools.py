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


def test_chats_have_functions_only(http: httpx.Client) -> None:
    tools = [{"type": "custom", "custom": {"name": "a"}}]
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools}
    answer = http.post("/v1/chat/completions", json=body)
    assert "served by /v1/responses" in answer.json()["error"]["message"]
