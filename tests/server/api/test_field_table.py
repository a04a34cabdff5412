"""Every field has one meaning: the table is whole, and each API does what it says."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.errors import RequestError
from millrace.server.api.anthropic.endpoint import MessagesRequest
from millrace.server.api.anthropic.endpoint import as_chat as anthropic_chat
from millrace.server.api.field_table import APIS, FIELDS, NESTED, PATHS, Api, Refusal
from millrace.server.api.openai_responses.items import as_chat as responses_chat
from millrace.server.api.openai_responses.items import input_items
from millrace.server.api.openai_responses.request import ResponsesRequest
from millrace.server.api.request_schema import ChatRequest, CompletionRequest, ModelRequest
from millrace.server.api.response_formats import wanted_output
from millrace.text.tools.schema import choose_tools, read_tools
from tests.support.live_server import LiveServer

BODIES: dict[Api, type[ModelRequest]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
    "responses": ResponsesRequest,
    "messages": MessagesRequest,
}
CHAT = [{"role": "user", "content": "hello"}]
PLAIN: dict[Api, dict[str, Any]] = {
    "chat": {"messages": CHAT, "max_tokens": 2},
    "completions": {"prompt": "hello", "max_tokens": 2},
    "responses": {"input": "hello", "max_output_tokens": 2},
    "messages": {"messages": CHAT, "max_tokens": 2},
}
CELLS = [(name, api) for name in FIELDS for api in APIS]


def post(http: httpx.Client, api: Api, **fields: Any) -> httpx.Response:
    return http.post(PATHS[api], json={**PLAIN[api], **fields})


@pytest.mark.parametrize("api", APIS)
def test_what_is_served_is_what_the_body_has(api: Api) -> None:
    served = {name for name, fates in FIELDS.items() if fates[api] == "served"}
    assert served == set(BODIES[api].__struct_fields__)
    assert all(FIELDS[name][owner] == "served" for owner, name in NESTED)


def test_every_field_has_a_fate_in_every_api() -> None:
    for fates in FIELDS.values():
        assert set(fates) == set(APIS)
        for fate in fates.values():
            assert not isinstance(fate, Refusal) or fate.reason


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_field_that_several_apis_serve_has_one_type(name: str) -> None:
    """What one API takes the others take: the same type, or one that more values have."""
    if name in ("metadata", "tool_choice", "max_tokens", "logprobs", "add_special_tokens"):
        return  # OpenAI's and Anthropic's own definitions differ
    kinds = {
        str(field.type)
        for api in APIS
        for field in msgspec.structs.fields(BODIES[api])
        if field.name == name
    }
    assert len(kinds) <= 1


@pytest.mark.parametrize("api", APIS)
def test_refused_fields_are_refused_and_neutral_values_are_not(
    http: httpx.Client, api: Api
) -> None:
    for name, fates in FIELDS.items():
        fate = fates[api]
        if not isinstance(fate, Refusal):
            continue
        error = post(http, api, **{name: [{"not": "neutral"}]})
        assert error.status_code == 400, name
        words = error.json()["error"]["message"]
        assert f"{name} is not supported: {fate.reason}; leave it out" in words
    neutral: dict[str, Any] = {}
    for name, fates in FIELDS.items():
        fate = fates[api]
        if isinstance(fate, Refusal):
            neutral[name] = fate.neutral[-1] if fate.neutral else None
    assert post(http, api, **neutral).status_code == 200


@pytest.mark.parametrize("api", APIS)
def test_fields_without_effect_are_accepted_and_told(
    http: httpx.Client, server: LiveServer, api: Api
) -> None:
    names = [name for name, fates in FIELDS.items() if fates[api] == "no effect"]
    answer = post(http, api, **{name: {"any": ["value"]} for name in names})
    assert answer.status_code == 200, answer.text
    for name in names:
        assert f"field '{name}' has no effect here" in server.log


@pytest.mark.parametrize(("api", "owner"), sorted(NESTED))
def test_fields_within_fields(http: httpx.Client, server: LiveServer, api: Api, owner: str) -> None:
    beside: dict[str, Any] = {"stream": True} if owner == "stream_options" else {}
    valid = {"type": "enabled"} if owner == "thinking" else {}
    for name, fate in NESTED[api, owner].items():
        if fate == "served":
            continue
        answer = post(http, api, **beside, **{owner: {**valid, name: "x"}})
        if isinstance(fate, Refusal):
            assert answer.status_code == 400
            assert f"{owner}.{name} is not supported: {fate.reason}" in answer.text
        else:
            assert answer.status_code == 200, answer.text
            assert f"field '{owner}.{name}' has no effect here" in server.log
    unknown = {**valid, "frobnicate": 1}
    assert post(http, api, **beside, **{owner: unknown}).status_code == 200
    assert f"unknown field '{owner}.frobnicate' is ignored" in server.log


def text_of(api: Api, answer: dict[str, Any]) -> str:
    """The words of an answer, whichever API it comes from."""
    if api == "chat":
        return str(answer["choices"][0]["message"]["content"])
    if api == "completions":
        return str(answer["choices"][0]["text"])
    if api == "messages":
        return "".join(block.get("text", "") for block in answer["content"])
    items = [item for item in answer["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in items for part in item["content"])


# The fake engine echoes the prompt, so what a field does to the text is the same in all chats.
SHARED: list[dict[str, Any]] = [
    {"stop": "lo w"}, {"stop": ["wor", "x"]}, {"stop": "wor", "include_stop_str_in_output": True},
    {"min_tokens": 4, "stop": "h"}, {"skip_special_tokens": False}, {"ignore_eos": True},
    {"seed": 3, "top_k": 5, "min_p": 0.1}, {"logit_bias": {"5": 1}, "priority": 0},
    {"stop_token_ids": [300]}, {"bad_words": ["zebra"], "allowed_token_ids": [1, 2, 300]},
]  # fmt: skip


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=st.sampled_from(SHARED), second=st.sampled_from(SHARED))
def test_a_shared_field_does_the_same_in_every_chat(
    http: httpx.Client, first: dict[str, Any], second: dict[str, Any]
) -> None:
    fields = {**first, **second}
    long = [{"role": "user", "content": "hello world, hello"}]
    chats: dict[Api, dict[str, Any]] = {
        "chat": {"messages": long, "max_tokens": 12},
        "messages": {"messages": long, "max_tokens": 12},
        "responses": {"input": long, "max_output_tokens": 12},
    }
    told = set()
    for api, body in chats.items():
        answer = http.post(PATHS[api], json={**body, **fields})
        assert answer.status_code == 200, answer.text
        told.add(text_of(api, answer.json()))
    assert len(told) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("top_p", 2), ("min_p", 3), ("seed", "x"), ("stop", [""]),
        ("min_tokens", -1), ("logit_bias", {"1": 101}), ("priority", 2**40), ("bad_words", [""]),
        ("structured_outputs", {"regex": "[a"}), ("stream_interval", 0),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_alike(http: httpx.Client, field: str, value: Any) -> None:
    answers = {api: post(http, api, stream=True, **{field: value}) for api in APIS}
    assert {answer.status_code for answer in answers.values()} == {400}
    told = {answer.json()["error"]["message"] for answer in answers.values()}
    assert len(told) == 1
    params = {api: answers[api].json()["error"].get("param") for api in APIS if api != "messages"}
    assert set(params.values()) == {field}


def test_errors_name_the_fields_that_the_client_sent(http: httpx.Client) -> None:
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}
    error = post(http, "responses", text={"format": schema}).json()["error"]
    assert error["param"] == "text.format"
    assert error["message"].startswith("text.format, schema: Invalid type")
    error = post(http, "messages", output_config={"format": schema}).json()["error"]
    assert error["message"].startswith("output_config.format, schema: Invalid type")
    error = post(http, "responses", max_output_tokens=10**6).json()["error"]
    assert error["param"] == "max_output_tokens"
    error = post(http, "chat", max_completion_tokens=10**6).json()["error"]
    assert error["param"] == "max_completion_tokens"
    error = post(http, "chat", messages=[{"role": "user", "content": "a " * 900}]).json()["error"]
    assert error["param"] == "messages"


BOUND = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FREE = {**BOUND, "properties": {"a": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize("schema", [BOUND, FREE])
def test_strict_means_the_same_in_every_api(
    http: httpx.Client, strict: bool | None, schema: dict[str, Any]
) -> None:
    described = {"name": "x", "schema": schema, "strict": strict}
    wanted = {"type": "json_schema", "json_schema": described}
    flat = {"type": "json_schema", **described}
    answers = [
        post(http, "chat", response_format=wanted),
        post(http, "completions", response_format=wanted),
        post(
            http,
            "chat",
            response_format={"type": "json_object", "schema": schema, "strict": strict},
        ),
        post(http, "responses", text={"format": flat}),
        post(http, "messages", output_config={"format": flat}),
        post(http, "messages", output_format=flat),
    ]
    fits = schema == BOUND or strict is False
    assert [one.status_code for one in answers] == [200 if fits else 400] * len(answers)


@pytest.mark.parametrize("kind", ["enabled", "disabled", "adaptive", "sometimes"])
def test_thinking_means_the_same_in_chats(http: httpx.Client, kind: str) -> None:
    thinking = {"type": kind}
    chat = post(http, "chat", thinking=thinking)
    other = post(http, "messages", thinking=thinking)
    assert chat.status_code == other.status_code == (400 if kind == "sometimes" else 200)
    if chat.status_code == 200:
        counts = chat.json()["usage"]["prompt_tokens"], other.json()["usage"]
        assert counts[0] == counts[1]["input_tokens"] + counts[1]["cache_read_input_tokens"]


def test_a_failed_tool_says_so(http: httpx.Client) -> None:
    def tokens(text: str, **fields: Any) -> int:
        use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "a", "content": text, **fields}
        messages = [
            *CHAT,
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
        ]
        answer = http.post("/v1/messages/count_tokens", json={"messages": messages})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["input_tokens"])

    assert tokens("42", is_error=True) == tokens("Error: 42") > tokens("42", is_error=False)
    assert tokens("", is_error=True) > tokens("")
    assert json.dumps(tokens("42", is_error=None)) == json.dumps(tokens("42"))


# --- one thing in the shapes of several APIs ----------------------------------------------------

FUNCTION: dict[str, Any] = {"name": "f", "description": "does f", "strict": True}
PARAMETERS = {"type": "object", "properties": {"x": {"enum": [7]}}, "required": ["x"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {**FUNCTION, "parameters": PARAMETERS}},
    {"type": "function", **FUNCTION, "parameters": PARAMETERS},
    {**FUNCTION, "parameters": PARAMETERS},
    {**FUNCTION, "input_schema": PARAMETERS},
]
FORCED: list[Any] = [
    "required", "any", {"type": "any"}, {"type": "required"}, {"type": "tool", "name": "f"},
    {"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}},
]  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("choice", ["none", {"type": "none"}, "auto", {"type": "auto"}, *FORCED])
def test_tools_and_choices_have_the_shapes_of_all_apis(tool: dict[str, Any], choice: Any) -> None:
    """Every API reads what the others take, and makes the same of it."""
    converters = [as_chat_itself, as_chat_messages]
    if "type" in tool:  # which /v1/responses needs, for it has several kinds
        converters.append(as_chat_responses)
    for convert in converters:
        body = convert([tool], choice)
        read = read_tools(body.tools)
        (one,) = read
        assert (one.name, one.parameters, one.strict) == ("f", PARAMETERS, True)
        assert one.given["function"]["description"] == "does f"
        found = choose_tools(read, body.tool_choice)
        mode = choice if isinstance(choice, str) else choice["type"]
        assert found.mode == (mode if mode in ("none", "auto") else "required")


def test_what_no_model_is_told_of_a_tool_is_logged(http: httpx.Client, server: LiveServer) -> None:
    more = {"cache_control": {"type": "ephemeral"}, "frobnicate": 1}
    tool = {"name": "f", "input_schema": PARAMETERS, **more}
    none = {"type": "none"}
    assert post(http, "messages", tools=[tool], tool_choice=none).status_code == 200
    assert "field 'tools.cache_control' has no effect here" in server.log
    assert "unknown field 'tools.frobnicate' is ignored" in server.log


def as_chat_itself(tools: list[Any], choice: Any) -> ChatRequest:
    return ChatRequest(messages=CHAT, tools=tools, tool_choice=choice)


def as_chat_messages(tools: list[Any], choice: Any) -> ChatRequest:
    body = MessagesRequest(messages=CHAT, max_tokens=1, tools=tools, tool_choice=choice)
    return anthropic_chat(body)


def as_chat_responses(tools: list[Any], choice: Any) -> ChatRequest:
    body = ResponsesRequest(input="hello", tools=tools, tool_choice=choice)
    return responses_chat(body, input_items("hello"))[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json"}, {"json_object": True}),
        ({"type": "json_object", "schema": PARAMETERS}, {"json": PARAMETERS}),
        ({"type": "json_object", "value": PARAMETERS}, {"json": PARAMETERS}),
        ({"type": "json_object", "schema": json.dumps(PARAMETERS)}, {"json": PARAMETERS}),
        ({"type": "json", "value": PARAMETERS}, {"json": PARAMETERS}),
        ({"type": "json_schema", "schema": PARAMETERS}, {"json": PARAMETERS}),
        ({"type": "json_schema", "json_schema": {"schema": PARAMETERS}}, {"json": PARAMETERS}),
        ({"type": "regex", "pattern": "a+"}, {"regex": "a+"}),
        ({"type": "regex", "value": "a+"}, {"regex": "a+"}),
        ({"type": "grammar", "grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"type": "text", "schema": 3}, None),
        (None, None),
    ],
)
def test_response_formats_of_other_servers(given: Any, wanted: Any) -> None:
    unknown: list[str] = []
    assert wanted_output(given, unknown.append) == wanted
    assert unknown == []


@pytest.mark.parametrize(
    "given",
    [
        {}, {"type": 7}, {"type": "regex"}, {"type": "grammar", "grammar": 3},
        {"type": "json_schema"}, {"type": "json_schema", "json_schema": "x"},
        {"type": "json_object", "schema": "{"}, {"type": "json_object", "schema": [1]},
    ],
)  # fmt: skip
def test_a_wrong_response_format_is_refused(given: Any) -> None:
    with pytest.raises(RequestError) as caught:
        wanted_output(given, lambda name: None)
    assert caught.value.param == "response_format"


def test_documents_of_text_are_text(http: httpx.Client) -> None:
    def tokens(*blocks: dict[str, Any]) -> int:
        body = {"messages": [{"role": "user", "content": list(blocks)}]}
        answer = http.post("/v1/messages/count_tokens", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["input_tokens"])

    text = {"type": "text", "text": "the words"}
    plain = {"type": "text", "media_type": "text/plain", "data": "the words"}
    parts = {"type": "content", "content": [text]}
    found = {"type": "search_result", "source": "s", "title": "t", "content": [text]}
    assert tokens({"type": "document", "source": plain}) == tokens(text)
    assert tokens({"type": "document", "source": parts}) == tokens(text)
    assert tokens({"type": "document", "source": plain, "title": "t"}) > tokens(text)
    assert tokens(found) > tokens(text)
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf"}}
    body = {"messages": [{"role": "user", "content": [pdf]}]}
    assert http.post("/v1/messages/count_tokens", json=body).status_code == 400
