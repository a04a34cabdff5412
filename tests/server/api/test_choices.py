"""Several outputs of one prompt, log-probabilities, resumed requests, and what bounds an output."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.http.test_bad_requests import CHAT, COMPLETIONS, MESSAGES, refused
from tests.support.live_server import LiveServer

WORDS = [{"role": "user", "content": "Wer reitet so spät? 🦊"}]
SHOWN = "user\nWer reitet so spät? 🦊"


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    extra = fields.pop("extra_body", {})
    return client.chat.completions.create(model="fake", messages=WORDS, extra_body=extra, **fields)  # type: ignore[call-overload]


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(model="fake", **fields)


# --- n and best_of ------------------------------------------------------------------------------


def test_n_outputs_of_a_chat_count_their_prompt_once(client: openai.OpenAI) -> None:
    one, three = chat(client), chat(client, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert [choice.message.content for choice in three.choices] == [SHOWN] * 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens
    assert three.usage.prompt_tokens_details == one.usage.prompt_tokens_details


def test_streamed_choices_come_apart_again(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    *chunks, last = chat(client, n=3, stream=True, stream_options=options)
    texts, roles, ends = [""] * 3, [0] * 3, [0] * 3
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        ends[choice.index] += choice.finish_reason == "stop"
    assert (texts, roles, ends) == ([SHOWN] * 3, [1] * 3, [1] * 3)
    assert last.usage == chat(client, n=3).usage


def test_n_of_several_prompts(client: openai.OpenAI) -> None:
    answer = complete(client, prompt=["hello", "world"], n=2, max_tokens=5)
    texts = [choice.text for choice in answer.choices]
    assert texts == [texts[0]] * 2 + [texts[2]] * 2
    assert texts[0].startswith("hello")
    assert texts[2].startswith("world")


def test_the_best_are_those_of_the_greatest_mean(client: openai.OpenAI) -> None:
    answer = complete(client, prompt=[[8, 8], [15, 15]], n=1, best_of=2, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"n": 2, "resume_token_ids": [1]}, "resume_token_ids"),
        ({"resume_token_ids": [1] * 17}, "resume_token_ids"),
        ({"resume_token_ids": [10**6]}, "resume_token_ids"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"logprobs": 1, "logprob_token_ids": [10**6]}, "logprob_token_ids"),
        ({"logprobs": 1, "logprob_token_ids": list(range(129))}, "logprob_token_ids"),
        ({"priority": 2**40}, "priority"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"guided_regex": "[a"}, "guided_regex"),
        ({"guided_json": {"type": "strin"}}, "guided_json"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = refused(http.post(COMPLETIONS, json={"prompt": "hello", **fields}), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "messages[0].tool_calls"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    error = refused(http.post(CHAT, json={"messages": MESSAGES, **fields}), 400)
    assert error["param"] == param


# --- log-probabilities --------------------------------------------------------------------------

PROMPT = [71, 72, 73]


def fake_logprob(token: int) -> float:
    return -(token % 8) / 8


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_of_a_completion(client: openai.OpenAI, stream: bool) -> None:
    extra = {"return_tokens_as_token_ids": True}
    got = complete(client, prompt=PROMPT, max_tokens=4, logprobs=1, stream=stream, extra_body=extra)
    parts = [chunk.choices[0].logprobs for chunk in (got if stream else [got])]
    tokens = [token for part in parts for token in part.tokens]
    assert tokens == [f"token_id:{token}" for token in (71, 72, 73, 71)]
    values = [value for part in parts for value in part.token_logprobs]
    assert values == [fake_logprob(token) for token in (71, 72, 73, 71)]
    tops = [top for part in parts for top in part.top_logprobs]
    assert tops[0] == {"token_id:71": fake_logprob(71), "token_id:72": fake_logprob(72)}


@pytest.mark.parametrize("stream", [True, False])
def test_offsets_are_those_of_the_text(client: openai.OpenAI, stream: bool) -> None:
    got = complete(client, prompt="quick fox", max_tokens=6, logprobs=0, echo=True, stream=stream)
    chunks = list(got) if stream else [got]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    assert text.startswith("quick fox")
    assert "".join(tokens) == text
    assert [text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
    values = [value for part in parts for value in part.token_logprobs]
    assert values[0] is None
    assert None not in values[1:]


def test_a_prompt_can_be_scored_alone(client: openai.OpenAI) -> None:
    answer = complete(client, prompt=PROMPT, max_tokens=0, logprobs=1, echo=True)
    (choice,) = answer.choices
    assert choice.logprobs.token_logprobs == [None, fake_logprob(72), fake_logprob(73)]
    assert len(choice.logprobs.tokens) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_of_a_chat(client: openai.OpenAI, stream: bool) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "extra_body": {"return_token_ids": True}}
    got = chat(client, stream=stream, **fields)
    choices = [chunk.choices[0] for chunk in got] if stream else [got.choices[0]]
    entries = [entry for choice in choices for entry in choice.logprobs.content]
    ids = [token for choice in choices for token in choice.token_ids]
    assert [entry.logprob for entry in entries] == [fake_logprob(token) for token in ids]
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(ids)
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert text == f"<|im_start|>{SHOWN}<|im_end|>"


@pytest.mark.parametrize("stream", [True, False])
def test_prompt_logprobs_come_once(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "prompt_logprobs": 1, "stream": stream}
    answer = http.post(COMPLETIONS, json=body)
    if stream:
        assert answer.text.count("prompt_logprobs") == 1
        return
    first, second, third = answer.json()["choices"][0]["prompt_logprobs"]
    assert first is None
    assert list(second) == ["72", "73"]
    assert second["72"] == {"logprob": fake_logprob(72), "rank": 1, "decoded_token": "i"}
    assert third["73"]["logprob"] == fake_logprob(73)
    chat_body = {"messages": MESSAGES, "prompt_logprobs": 0, "max_tokens": 1}
    chat_answer = http.post(CHAT, json=chat_body).json()
    assert len(chat_answer["prompt_logprobs"]) == chat_answer["usage"]["prompt_tokens"]


# --- resumed requests ---------------------------------------------------------------------------


def test_every_cut_of_a_stream_can_be_resumed(http: httpx.Client) -> None:
    """What was shown before a cut and what the resumed request shows are the whole answer."""
    body = {
        "prompt": "spät 🦊🐺 stop",
        "stop": ["stopp", "sp"],
        "min_tokens": 3,
        "max_tokens": 40,
        "return_token_ids": True,
        "stream": True,
    }
    chunks = events(http, COMPLETIONS, body)
    tokens, text = joined(chunks)
    end = chunks[-1]["choices"][0]
    assert (end["finish_reason"], end["stop_reason"]) == ("stop", "sp")
    for shown in range(len(chunks)):  # a chunk may hold several tokens
        before_tokens, before = joined(chunks[:shown])
        cut = len(before_tokens)
        rest = events(http, COMPLETIONS, {**body, "resume_token_ids": tokens[:cut]})
        more, after = joined(rest)
        assert more == tokens[cut:]
        assert before + after == text
        last = rest[-1]["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", "sp")


def test_usage_counts_what_was_resumed(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "resume_token_ids": [71, 72]}
    answer = http.post(COMPLETIONS, json={**body, "return_token_ids": True}).json()
    assert answer["choices"][0]["token_ids"] == [73, 71, 72, 73]
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("resumed", "fields", "reason"),
    [
        ([71, 72], {"max_tokens": 2}, "length"),
        ([71, 72], {"stop_token_ids": [72]}, "stop"),
        ([71, 72], {"stop": ["hi"]}, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_an_output_that_was_complete_ends_at_once(
    http: httpx.Client, resumed: list[int], fields: Any, reason: str, stream: bool
) -> None:
    body = {"prompt": PROMPT, "resume_token_ids": resumed, "stream": stream, **fields}
    if stream:
        (answer,) = events(http, COMPLETIONS, body)
    else:
        answer = http.post(COMPLETIONS, json=body).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", reason)


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream that ends well."""
    lines = [line for line in http.post(path, json=body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", lines
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]]) -> tuple[list[int], str]:
    choices = [chunk["choices"][0] for chunk in chunks]
    tokens = [token for choice in choices for token in choice.get("token_ids", [])]
    return tokens, "".join(choice["text"] for choice in choices)


# --- bounds of an output ------------------------------------------------------------------------


def test_a_stop_text_is_not_looked_for_before_min_tokens(client: openai.OpenAI) -> None:
    fields: Any = {"prompt": [71, 72, 73], "stop": "h", "max_tokens": 9}
    assert complete(client, **fields).choices[0].text == ""
    extra = {"min_tokens": 4}
    assert complete(client, extra_body=extra, **fields).choices[0].text == "hijhij"


def test_a_prompt_is_truncated_from_its_front(http: httpx.Client) -> None:
    body = {"prompt": [71] * 600 + [72, 73], "max_tokens": 4, "return_token_ids": True}
    for kept, length in ((2, 2), (-1, 508)):
        answer = http.post(COMPLETIONS, json={**body, "truncate_prompt_tokens": kept}).json()
        prompt = answer["choices"][0]["prompt_token_ids"]
        assert (len(prompt), prompt[-2:]) == (length, [72, 73])


def test_the_side_of_truncation_is_the_clients(http: httpx.Client) -> None:
    body = {"prompt": [71, 72, *[73] * 600, 74], "max_tokens": 4, "return_token_ids": True}

    def kept(count: int, **fields: Any) -> list[int]:
        fields["truncate_prompt_tokens"] = count
        answer = http.post(COMPLETIONS, json={**body, **fields}).json()
        ids: list[int] = answer["choices"][0]["prompt_token_ids"]
        return ids

    assert kept(3, truncation_side="right") == [71, 72, 73]
    assert kept(2, truncation_side="left") == kept(2) == [73, 74]
    assert len(kept(-1, truncation_side="right")) == 508
    wrong = http.post(COMPLETIONS, json={**body, "truncation_side": "middle"})
    assert "truncation_side" in refused(wrong, 400)["message"]


@pytest.mark.parametrize(("side", "text"), [("left", " end"), ("right", "begin")])
def test_a_text_far_too_long_can_be_truncated(http: httpx.Client, side: str, text: str) -> None:
    prompt = "begin" + " spät" * 60_000 + " end"
    body = {"prompt": prompt, "max_tokens": 1}
    assert refused(http.post(COMPLETIONS, json=body), 400)
    wanted = {"truncate_prompt_tokens": 8, "truncation_side": side, "return_token_ids": True}
    answer = http.post(COMPLETIONS, json={**body, **wanted}).json()
    prompt_ids = answer["choices"][0]["prompt_token_ids"]
    shown = http.post("/detokenize", json={"tokens": prompt_ids}).json()["prompt"]
    assert shown.startswith(text) if side == "right" else shown.endswith(text)


def test_the_prompt_of_a_chat_is_shown_on_request(http: httpx.Client) -> None:
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    body = {"messages": MESSAGES, "max_tokens": 3}
    assert http.post(CHAT, json=body).json()["prompt_text"] is None
    wanted = {**body, "return_prompt_text": True}
    assert http.post(CHAT, json=wanted).json()["prompt_text"] == rendered
    first, *others = events(http, CHAT, {**wanted, "stream": True})
    assert first["prompt_text"] == rendered
    assert not any("prompt_text" in chunk for chunk in others)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_chunk_has_as_many_tokens_as_asked_for(http: httpx.Client, path: str) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hello"}
    body = {**prompt, "max_tokens": 9, "ignore_eos": True, "stream": True, "return_token_ids": True}
    chunks = events(http, path, {**body, "stream_interval": 4})
    counts = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks]
    assert all(count >= 4 for count in counts[1:-1])
    assert sum(counts) == 9
    wrong = http.post(path, json={**body, "stream_interval": 0})
    assert "stream_interval" in refused(wrong, 400)["message"]


def test_keys_that_say_nothing_are_null(http: httpx.Client) -> None:
    chat = http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2}).json()
    nulls = ("service_tier", "system_fingerprint", "prompt_logprobs", "prompt_token_ids")
    assert [chat[key] for key in nulls] == [None] * 4
    message = chat["choices"][0]["message"]
    empty = ("refusal", "annotations", "audio", "function_call", "reasoning_content", "reasoning")
    assert [message[key] for key in empty] == [None] * 6
    text = http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).json()
    assert [text[key] for key in nulls[:2]] == [None] * 2
    choice = text["choices"][0]
    assert [choice[key] for key in (*nulls[2:], "token_ids", "logprobs")] == [None] * 4


@pytest.mark.parametrize(
    "field",
    [
        {"watermarking": True},
        {"ec_transfer_params": {"a": 1}},
        {"media_io_kwargs": {"video": {"fps": 1}}},
        {"return_weight_versions": True},
        {"routed_experts_prompt_start": 3},
    ],
)
def test_what_vllm_has_besides_is_refused_with_the_reason(
    http: httpx.Client, field: dict[str, Any]
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2}
    error = refused(http.post(CHAT, json={**body, **field}), 400)
    assert error["code"] == "unsupported_parameter"
    assert http.post(CHAT, json={**body, **dict.fromkeys(field)}).status_code == 200


def test_the_final_message_is_continued(http: httpx.Client) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "It is "}]
    body = {
        "messages": messages,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "return_token_ids": True,
        "max_tokens": 1,
    }
    prompt = http.post(CHAT, json=body).json()["prompt_token_ids"]
    text = http.post("/detokenize", json={"tokens": prompt}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\nIt is ")


def test_tokens_and_back(http: httpx.Client, server: LiveServer) -> None:
    body = {"prompt": "hello 🦊", "return_token_strs": True}
    answer = http.post("/tokenize", json=body).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "hello 🦊"}
    tokens = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    prompt = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for wrong in ({}, {"prompt": "a", "messages": MESSAGES}, {"prompt": 3}):
        assert refused(http.post("/tokenize", json=wrong), 400)
    assert refused(http.post("/detokenize", json={"tokens": [10**6]}), 400)
