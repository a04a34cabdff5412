"""Tools by the official clients of two makers, over three families of endpoints.

The fake engine echoes the prompt up to the user's turn end, so the user's words are the answer.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.server.api.test_choices import events
from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server
from tests.support.text_model import TOOLS as TEMPLATE
from tests.support.text_model import token_id, write_text_model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
ANTHROPIC: Any = [
    {"name": "weather", "input_schema": SCHEMA},
    {"name": "now", "description": "The time.", "input_schema": {"type": "object"}},
]
FLAT: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRio 🦊\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
JSON = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ANSWER = f"hm\n</think>\n\nSo:\n\n{XML}\n{JSON}"
MESSAGES: Any = [{"role": "user", "content": ANSWER}]
CALLS = [("weather", {"city": "Rio 🦊", "days": 3}), ("now", {})]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("tools")
    model = write_text_model(folder / "model", TEMPLATE)
    behaviour = Behaviour(eos=token_id(model, "<|im_end|>"))
    with fake_server(model, folder / "log", behaviour, max_model_len=2048) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def claude(server: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as one:
        yield one


# --- chats --------------------------------------------------------------------------------------


def test_calls_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "So:"
    calls: Any = choice.message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == CALLS
    assert {call.type for call in calls} == {"function"}
    assert len({call.id for call in calls}) == 2


def test_streamed_calls_of_two_choices(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, tools=TOOLS, stream=True, n=2
    )
    calls: list[dict[int, Any]] = [{}, {}]
    words, ends = ["", ""], [None, None]
    for chunk in stream:
        (choice,) = chunk.choices
        words[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ends[choice.index]  # type: ignore[call-overload]
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.id is not None:
                assert call.type == "function"
                calls[choice.index][call.index] = [call.function.name, "", 0]
            calls[choice.index][call.index][1] += call.function.arguments
            calls[choice.index][call.index][2] += 1
    assert words == ["So:"] * 2
    assert ends == ["tool_calls"] * 2
    for one in calls:
        assert [(name, json.loads(text)) for name, text, _ in one.values()] == CALLS
        assert one[0][2] > 3  # arguments come in parts, as they are written


@pytest.mark.parametrize("interval", [1, 3, 8, 1000])
def test_a_chunk_has_one_part_of_a_call(client: openai.OpenAI, interval: int) -> None:
    """Clients read an index once in a chunk, so several parts of a call in it are one."""
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, tools=TOOLS, stream=True,
        extra_body={"stream_interval": interval},
    )  # fmt: skip
    calls: dict[int, list[str]] = {}
    for chunk in stream:
        parts = chunk.choices[0].delta.tool_calls or []
        assert len({part.index for part in parts}) == len(parts)
        for part in parts:
            assert part.function is not None
            one = calls.setdefault(part.index, [part.function.name or "", ""])
            one[1] += part.function.arguments or ""
    assert [(name, json.loads(text)) for name, text in calls.values()] == CALLS


def test_a_call_can_be_resumed_in_its_middle(http: httpx.Client) -> None:
    body = {
        "messages": MESSAGES, "tools": TOOLS, "stream": True, "return_token_ids": True
    }  # fmt: skip
    path = "/v1/chat/completions"
    chunks = events(http, path, body)
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    parts = [chunk["choices"][0] for chunk in chunks]
    for shown in range(0, len(parts), 23):  # a chunk may hold several tokens
        before = [part["delta"] for part in parts[:shown]]
        cut = sum(len(part["token_ids"]) for part in parts[:shown])
        rest = events(http, path, {**body, "resume_token_ids": tokens[:cut]})
        after = [chunk["choices"][0]["delta"] for chunk in rest]
        assert told(before + after) == told([part["delta"] for part in parts])
        assert rest[-1]["choices"][0]["finish_reason"] == "tool_calls"
    whole = http.post(path, json={**body, "stream": False, "resume_token_ids": tokens[:90]})
    calls = whole.json()["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["weather", "now"]
    assert json.loads(calls[0]["function"]["arguments"]) == CALLS[0][1]


def told(deltas: list[dict[str, Any]]) -> Any:
    """What a stream's deltas say together."""
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            name = call["function"].get("name", "")
            one = calls.setdefault(call["index"], ["", ""])
            one[0] += name
            one[1] += call["function"]["arguments"]
    return (
        "".join(delta.get("reasoning_content", "") for delta in deltas),
        "".join(delta.get("content", "") for delta in deltas),
        calls,
    )


NO_CLOSING_TAGS = re.sub(r"\n?</.*>", "", XML)
DRIFTED: dict[str, Any] = {
    "missing tags": (f"</think>\n\n{NO_CLOSING_TAGS}\n{JSON}", CALLS),
    "one block": (f"</think>\n\n{XML.replace('</tool_call>', '')}\n<function=now>", CALLS),
    "no opening tag": (f"</think>\n\n{XML.replace('<tool_call>', '')}", CALLS[:1]),
    "unclosed reasoning": (f"I look.\n{XML}\n{JSON}", CALLS),
    "words behind": (f"</think>\n\nSo: {XML}\nAnd {JSON[:-12]} then.", CALLS),
    "literals": ("</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\n\"</b>\"\n"
                 "</parameter>\n<parameter=days>\nNone\n",
                 [("weather", {"city": '"</b>"', "days": None})]),
}  # fmt: skip


@pytest.mark.parametrize("kind", DRIFTED)
def test_drifted_calls_are_the_same_streamed_and_whole(
    http: httpx.Client, claude: anthropic.Anthropic, kind: str
) -> None:
    text, calls = DRIFTED[kind]
    body: Any = {"messages": [{"role": "user", "content": text}], "tools": TOOLS}
    (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
    whole = choice["message"]
    functions = [call["function"] for call in whole["tool_calls"]]
    assert [(one["name"], json.loads(one["arguments"])) for one in functions] == calls
    assert choice["finish_reason"] == "tool_calls"
    chunks = events(http, "/v1/chat/completions", {**body, "stream": True})
    streamed = told([chunk["choices"][0]["delta"] for chunk in chunks])
    assert streamed[:2] == (whole["reasoning_content"] or "", whole["content"] or "")
    assert list(streamed[2].values()) == [[one["name"], one["arguments"]] for one in functions]
    asked: Any = {"model": "fake", "max_tokens": 800, "messages": body["messages"]}
    message = claude.messages.create(**asked, tools=ANTHROPIC)
    used = [(one.name, one.input) for one in message.content if one.type == "tool_use"]
    assert used == calls
    with claude.messages.stream(**asked, tools=ANTHROPIC) as stream:
        content = stream.get_final_message().content
    assert [shown(one) for one in content] == [shown(one) for one in message.content]


def shown(block: Any) -> Any:
    """A block of Anthropic's API without its id."""
    return {key: value for key, value in block.to_dict().items() if key not in ("id", "signature")}


def test_a_call_that_is_cut_stays_open(http: httpx.Client) -> None:
    """And goes back as history."""
    body: Any = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 60}
    (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"].startswith('{"city": "R')
    with pytest.raises(json.JSONDecodeError):
        json.loads(call["function"]["arguments"])
    messages = [*MESSAGES, choice["message"], {"role": "tool", "tool_call_id": "c", "content": ""}]
    answer = http.post("/v1/chat/completions", json={**body, "messages": messages})
    assert answer.status_code == 200, answer.text


def test_strict_calls_that_look_like_text_are_refused(http: httpx.Client) -> None:
    function = {"name": "now", "strict": True}
    body = {"messages": MESSAGES, "tools": [{"type": "function", "function": function}]}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["code"] == "invalid_grammar"
    assert "<tool_call> is not a token of this model" in error["message"]


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_where_no_tool_may_be_called_a_call_is_text(client: openai.OpenAI, fields: Any) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, **fields)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == f"So:\n\n{XML}\n{JSON}"
    assert answer.choices[0].finish_reason == "stop"


def test_tools_and_past_calls_reach_the_template(http: httpx.Client) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    tokens = http.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    prompt = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert "<|im_start|>tool\nnoon<|im_end|>" in prompt
    assert '"name": "weather"' in prompt
    call["function"]["arguments"] = "{broken"  # type: ignore[index]
    error = http.post("/tokenize", json={"messages": messages}).json()["error"]
    assert error["param"] == "messages[1].tool_calls[0].function.arguments"


# --- Anthropic ----------------------------------------------------------------------------------

ASKED: Any = {"model": "fake", "max_tokens": 400, "messages": MESSAGES}


def blocks_of(message: Any) -> Any:
    kinds = [block.type for block in message.content]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, *calls = message.content
    return thinking.thinking, text.text, [(call.name, call.input) for call in calls]


def test_a_message_of_every_kind_of_block(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(**ASKED, tools=ANTHROPIC)
    assert blocks_of(message) == ("user\nhm", "So:", CALLS)
    assert message.stop_reason == "tool_use"
    usage = message.usage
    count = claude.messages.count_tokens(model="fake", messages=MESSAGES, tools=ANTHROPIC)
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == count.input_tokens


def test_a_streamed_message_is_the_same(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(**ASKED, tools=ANTHROPIC) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    whole = claude.messages.create(**ASKED, tools=ANTHROPIC)
    assert blocks_of(message) == blocks_of(whole)
    assert (message.stop_reason, message.usage) == (whole.stop_reason, whole.usage)
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4


def test_thinking_is_signed(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(**ASKED, tools=ANTHROPIC).content[0]
    with claude.messages.stream(**ASKED, tools=ANTHROPIC) as stream:
        raw: list[Any] = [
            event for event in stream if event.type in ("content_block_start", "signature")
        ]
        streamed = stream.get_final_message()
    assert whole.type == "thinking"
    assert len(whole.signature) > 20
    assert raw[0].content_block.signature == ""
    assert raw[1].signature == whole.signature
    assert streamed.content[0] == whole
    details = streamed.usage.output_tokens_details
    assert details is not None
    assert 0 < details.thinking_tokens < streamed.usage.output_tokens
    assert streamed.usage.cache_creation_input_tokens == 0


def test_template_variables_reach_the_template_of_messages(claude: anthropic.Anthropic) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = claude.messages.create(**ASKED, extra_body=off)
    assert [block.type for block in answer.content] == ["text"]
    count = claude.messages.count_tokens(model="fake", messages=MESSAGES, extra_body=off)
    usage = answer.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == count.input_tokens


def test_how_a_message_ends(claude: anthropic.Anthropic) -> None:
    plain: Any = {"model": "fake", "messages": [{"role": "user", "content": "a</think>b STOP"}]}
    full = claude.messages.create(**plain, max_tokens=99)
    assert (full.stop_reason, full.stop_sequence) == ("end_turn", None)
    short = claude.messages.create(**plain, max_tokens=3)
    assert short.stop_reason == "max_tokens"
    stopped = claude.messages.create(**plain, max_tokens=99, stop_sequences=["STOP"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "STOP")
    off = claude.messages.create(**plain, max_tokens=99, thinking={"type": "disabled"})
    assert [block.type for block in off.content] == ["text"]


def test_results_and_thoughts_go_back(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "t", "name": "now", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": "noon"},
                {"type": "text", "text": "so?"},
            ],
        },
    ]
    fields: Any = {"model": "fake", "messages": messages, "tools": ANTHROPIC}
    count = claude.messages.count_tokens(system="Be brief.", **fields).input_tokens
    same = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "noon"},
        {"role": "user", "content": "so?"},
    ]
    tools = [
        {"type": "function", "function": {"name": t["name"], "parameters": t["input_schema"]}
         | ({"description": t["description"]} if "description" in t else {})}
        for t in ANTHROPIC
    ]  # fmt: skip
    assert http.post("/tokenize", json={"messages": same, "tools": tools}).json()["count"] == count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "runs no tools"),
        ({"tool_choice": {"type": "some"}}, "tool_choice must be"),
        ({"tool_choice": {"type": "tool", "name": "never"}, "tools": ANTHROPIC}, "names never"),
        ({"thinking": {"type": "much"}}, "thinking.type must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "text only"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "role must be user or assistant"),
        ({"messages": []}, "messages is empty"),
        ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers is not supported"),
    ],
)
def test_a_wrong_message_is_refused(claude: anthropic.Anthropic, fields: Any, message: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as caught:
        claude.messages.create(**{**ASKED, **fields})
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"


def test_hints_that_change_no_answer_are_accepted(http: httpx.Client) -> None:
    hints = {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    }
    assert http.post("/v1/messages?beta=true", json={**ASKED, **hints}).status_code == 200


def test_another_model_is_not_found(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**{**ASKED, "model": "other"})


# --- /v1/responses ------------------------------------------------------------------------------


def items_of(response: Any) -> Any:
    kinds = [item.type for item in response.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, *calls = response.output
    assert (response.status, message.role) == ("completed", "assistant")
    calls = [(call.name, json.loads(call.arguments)) for call in calls]
    return reasoning.content[0].text, message.content[0].text, calls


def test_a_response_of_every_kind_of_item(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input=ANSWER, tools=FLAT)
    assert items_of(response) == ("user\nhm", "So:", CALLS)
    assert response.output_text == "So:"
    usage: Any = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens


def test_a_streamed_response_is_the_same(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake", input=ANSWER, tools=FLAT) as stream:
        seen: list[Any] = list(stream)
        response = stream.get_final_response()
    assert items_of(response) == ("user\nhm", "So:", CALLS)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    kinds = [event.type for event in seen]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == 4
    assert kinds.count("response.output_item.done") == 4


def test_a_response_goes_back_as_input(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input=ANSWER, tools=FLAT)
    call: Any = response.output[-1]
    again: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "a </think> b"}]},
        *response.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "noon"},
    ]
    answer = client.responses.create(model="fake", input=again, tools=FLAT)
    assert answer.output_text == "b"


def test_a_response_that_is_cut_off_says_so(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="hello", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    stream = client.responses.create(model="fake", input="hello", max_output_tokens=2, stream=True)
    assert list(stream)[-1].type == "response.incomplete"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "'resp_1' not found"),
        ({"background": True, "store": False}, "can only be used when `store` is true"),
        ({"tools": [{"type": "web_search"}]}, "runs no tools"),
        ({"input": []}, "input is empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'x' not found"),
        ({"input": [{"type": "computer_call"}]}, "must be message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text only"),
        ({"reasoning": {"effort": "none of it"}}, "reasoning.effort must be one of"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "must be a JSON schema"),
    ],
)
def test_a_wrong_response_is_refused(client: openai.OpenAI, fields: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**{"model": "fake", "input": "hello", **fields})


# --- bodies with something wrong in them --------------------------------------------------------

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "tool_calls": [{"id": "c", **TOOLS[1]}]},
            {"role": "tool", "tool_call_id": "c", "content": "noon"},
        ],
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "now"}},
        "max_tokens": 4,
    },
    "/v1/messages": {
        "max_tokens": 4,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"},
                                              {"type": "tool_use", "name": "now", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "content": [
                {"type": "text", "text": "r"}]}]},
        ],
        "tools": ANTHROPIC,
        "tool_choice": {"type": "tool", "name": "now"},
        "thinking": {"type": "enabled", "budget_tokens": 9},
        "output_config": {"effort": "low"},
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
            {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "noon"},
            {"type": "custom_tool_call", "call_id": "d", "name": "say", "input": "a"},
            {"type": "custom_tool_call_output", "call_id": "d", "output": "b"},
        ],
        "tools": [
            *FLAT,
            {"type": "custom", "name": "say", "description": "d", "format": {
                "type": "grammar", "syntax": "regex", "definition": "[a-z]+"}},
            {"type": "namespace", "name": "files", "description": "d", "tools": [FLAT[1]]},
        ],
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "max_tool_calls": 3,
        "truncation": "auto",
        "store": True,
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [FLAT[1]]},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "max_output_tokens": 4,
    },
    "/tokenize": {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS},
}  # fmt: skip
ODD: list[Any] = [None, True, 0, -1, 2**70, 1e300, "", "x", "{", [], [None], [[]], {}, {"a": {}},
                  {"type": "x"}, {"type": "text", "text": 3}]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a body."""
    inner = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in inner if isinstance(node, (dict, list)) else ():
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("path", BODIES)
def test_nothing_wrong_in_a_body_makes_the_server_fail(http: httpx.Client, path: str) -> None:
    """Each part of a rich body in turn is left out, and replaced by something odd."""
    for at, place in enumerate(places(BODIES[path])):
        for odd in ("missing", ODD[at % len(ODD)], ODD[(at * 7 + 3) % len(ODD)]):
            body = copy.deepcopy(BODIES[path])
            node: Any = body
            for key in place[:-1]:
                node = node[key]
            if odd == "missing":
                del node[place[-1]]
            else:
                node[place[-1]] = odd
            answer = http.post(path, json=body)
            assert answer.status_code in (200, 400, 404), (place, odd, answer.text)
            if answer.status_code == 400:
                assert "\n" not in answer.json()["error"]["message"]


def test_a_message_that_is_cut_off_shows_what_its_call_has(http: httpx.Client) -> None:
    seen: list[Any] = []
    for most in range(8, 90, 2):
        body = {
            "messages": [{"role": "user", "content": f"</think>\n\n{XML}"}],
            "max_tokens": most,
            "tools": ANTHROPIC,
        }
        answer = http.post("/v1/messages", json=body).json()
        for block in answer["content"]:
            if block["type"] == "tool_use" and answer["stop_reason"] == "max_tokens":
                shown = block["input"].get("city", "").rstrip("\ufffd")  # half of a character
                assert "Rio 🦊".startswith(shown)
                seen.append({**block["input"], "city": shown.strip()})
    assert {"city": "Rio"} in seen
