"""The official client against the server. The fake engine echoes the prompt, so text is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from millrace.text.checkpoint.files import vocab_size

CHAT: list[Any] = [{"role": "user", "content": "Wer reitet so spät? 🦊"}]
RENDERED = "<|im_start|>user\nWer reitet so spät? 🦊<|im_end|>\n<|im_start|>assistant\n"
SHOWN = "user\nWer reitet so spät? 🦊"  # up to the turn's end, without special tokens


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=CHAT)
    (choice,) = answer.choices
    assert choice.message.content == SHOWN
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    usage = answer.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2


def test_a_streamed_chat_says_the_same(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    whole = client.chat.completions.create(model="fake", messages=CHAT)
    *parts, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert [part.usage for part in parts] == [None] * len(parts)
    assert [part.choices[0].delta.role for part in parts] == ["assistant"] + [None] * (
        len(parts) - 1
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == SHOWN
    reasons = [part.choices[0].finish_reason for part in parts]
    assert reasons == [None] * (len(parts) - 1) + ["stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_usage_in_every_chunk_counts_up(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = client.completions.create(
        model="fake", prompt="hello", max_tokens=6, stream=True, stream_options=options
    )
    counts = [part.usage.completion_tokens for part in parts if part.usage]
    assert counts == sorted(counts)
    assert len(counts) == len(parts)
    assert counts[-1] == last.usage.completion_tokens == 6


def test_several_prompts_are_several_choices(client: openai.OpenAI) -> None:
    prompts = ["hello", "world 🦊", "END."]
    answer = client.completions.create(model="fake", prompt=prompts, max_tokens=40)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        assert choice.text.startswith(prompt * 2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 120


def test_several_prompts_stream_side_by_side(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(
        model="fake", prompt=["hello", "world"], max_tokens=12, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    whole = client.completions.create(model="fake", prompt=["hello", "world"], max_tokens=12)
    assert list(texts.values()) == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("prompt", [[71, 72, 73], [[71, 72, 73], [74]]])
def test_token_ids_go_in_and_come_out(client: openai.OpenAI, prompt: Any) -> None:
    extra = {"return_token_ids": True}
    answer = client.completions.create(model="fake", prompt=prompt, max_tokens=5, extra_body=extra)
    first: Any = answer.choices[0]
    assert first.prompt_token_ids == [71, 72, 73]
    assert first.token_ids == [71, 72, 73, 71, 72]
    if isinstance(prompt[0], list):
        other: Any = answer.choices[1]
        assert other.token_ids == [74] * 5


@pytest.mark.parametrize("chat", [True, False])
def test_streamed_token_ids_add_up(client: openai.OpenAI, chat: bool) -> None:
    extra = {"return_token_ids": True}
    create: Any
    if chat:
        create, prompt = client.chat.completions.create, {"messages": CHAT}
    else:
        create, prompt = client.completions.create, {"prompt": RENDERED}
    whole = create(model="fake", max_tokens=9, extra_body=extra, **prompt)
    chunks = list(create(model="fake", max_tokens=9, extra_body=extra, stream=True, **prompt))
    streamed = [i for chunk in chunks for i in chunk.choices[0].token_ids]
    assert streamed == whole.choices[0].token_ids
    carriers = [chunk if chat else chunk.choices[0] for chunk in chunks]
    source = whole if chat else whole.choices[0]
    assert carriers[0].prompt_token_ids == source.prompt_token_ids
    assert not any(hasattr(carrier, "prompt_token_ids") for carrier in carriers[1:])


def test_token_ids_are_not_sent_unasked(client: openai.OpenAI) -> None:
    answer: Any = client.completions.create(model="fake", prompt="hello", max_tokens=2)
    assert answer.choices[0].token_ids is None
    assert answer.choices[0].prompt_token_ids is None


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_text_ends_the_answer(client: openai.OpenAI, stream: bool) -> None:
    extra = {"ignore_eos": True}
    create: Any = client.completions.create
    got = create(
        model="fake", prompt="hello stop world", stop=["stop w", "never"], max_tokens=400,
        extra_body=extra, stream=stream,
    )  # fmt: skip
    chunks = list(got) if stream else [got]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].stop_reason == "stop w"


def test_a_stop_text_may_be_shown(client: openai.OpenAI) -> None:
    extra = {"include_stop_str_in_output": True}
    answer = client.completions.create(
        model="fake", prompt="hello stop world", stop="stop", max_tokens=99, extra_body=extra
    )
    assert answer.choices[0].text == "hello stop"


def test_a_stop_token_is_named(client: openai.OpenAI) -> None:
    extra = {"stop_token_ids": [72]}
    answer: Any = client.completions.create(model="fake", prompt=[71, 72, 73], extra_body=extra)
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", 72)


def test_special_tokens_are_shown_on_request(client: openai.OpenAI) -> None:
    extra = {"skip_special_tokens": False, "ignore_eos": True}
    answer: Any = client.chat.completions.create(
        model="fake", messages=CHAT, max_tokens=400, extra_body=extra
    )
    assert answer.choices[0].message.content.startswith(RENDERED)


def test_without_max_tokens_a_chat_takes_what_fits(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=CHAT, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_without_max_tokens_a_completion_has_16(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="hello")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_the_default_of_16_is_cut_to_what_fits(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=[71] * 505)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7


def test_template_variables_reach_the_template(client: openai.OpenAI) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "ignore_eos": True}
    answer = client.chat.completions.create(model="fake", messages=CHAT, extra_body=extra)
    assert "<think>\n\n</think>" in (answer.choices[0].message.content or "")


def test_the_model_is_listed_under_its_names(client: openai.OpenAI, text_model: Path) -> None:
    models: list[Any] = list(client.models.list())
    assert [model.id for model in models] == ["fake", "alias"]
    assert {model.max_model_len for model in models} == {512}
    assert {model.vocab_size for model in models} == {vocab_size(text_model)}
    assert client.models.retrieve("alias") == models[1]
    with pytest.raises(openai.NotFoundError, match="fake or alias"):
        client.models.retrieve("other/one")


def test_the_alias_is_answered_as_such(client: openai.OpenAI) -> None:
    assert client.completions.create(model="alias", prompt="hello").model == "alias"


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="fake or alias"):
        client.completions.create(model="gpt-9", prompt="hello")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="hello", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="this prompt can never run"):
        client.completions.create(model="fake", prompt="two words", stream=True)
