"""Prompts that fit, and clear words for those that do not."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import CheckpointError, RequestError
from millrace.protocol import SamplingParams
from millrace.text.messages import is_long, normalize_messages
from millrace.text.processor import TextProcessor
from tests.support.text_model import write_text_model


@pytest.fixture(scope="module")
def processor(text_model: Path) -> TextProcessor:
    return TextProcessor.load(text_model, text_model)


def test_defaults_come_from_the_checkpoint(text_model: Path) -> None:
    auto = TextProcessor.load(text_model, text_model).defaults
    assert (auto.temperature, auto.top_p, auto.top_k) == (0.6, 0.95, 20)
    plain = TextProcessor.load(text_model, text_model, "vllm").defaults
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)


def test_the_vocabulary_is_the_embeddings(processor: TextProcessor) -> None:
    assert processor.vocab_size == processor.tokenizer.vocab_size + 7


@given(
    length=st.integers(1, 40),
    wanted=st.none() | st.integers(1, 40),
    unsaid=st.none() | st.integers(1, 40),
)
def test_a_request_always_fits_or_is_refused(
    processor: TextProcessor, length: int, wanted: int | None, unsaid: int | None
) -> None:
    limit = 20
    params = SamplingParams(max_tokens=wanted)
    if length >= limit or length + (wanted or 0) > limit:
        with pytest.raises(RequestError, match=str(length)) as caught:
            processor.request("r", [1] * length, params, limit, unsaid)
        assert caught.value.code == "context_length_exceeded"
        return
    request = processor.request("r", [1] * length, params, limit, unsaid)
    settled = request.params.max_tokens
    assert settled is not None
    assert length + settled <= limit
    if wanted is not None:
        assert settled == wanted
    else:
        assert settled == min(limit - length, unsaid or limit)


def test_turn_ends_travel_with_the_request(processor: TextProcessor) -> None:
    text = processor.chat_prompt([{"role": "user", "content": "hi"}])
    ids = processor.encode(text, add_special_tokens=False)
    request = processor.request("r", ids, SamplingParams(), 100)
    (end,) = request.boundaries
    assert processor.tokenizer.decode(ids[:end], False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_outside_the_vocabulary_is_named(processor: TextProcessor, token: int) -> None:
    with pytest.raises(RequestError, match=rf"token id {token} is out of vocabulary; use 0 to"):
        processor.request("r", [1, token, 2], SamplingParams(), 100)


def test_an_empty_prompt_is_refused(processor: TextProcessor) -> None:
    with pytest.raises(RequestError, match="at least one token"):
        processor.request("r", [], SamplingParams(), 100)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ('{"city": "Par', {"city": "Par"}),
        ('{"city": "Paris", "da', {"city": "Paris"}),
        ('{"city": "Paris", "days": ', {"city": "Paris"}),
        ('{"city": "Paris", "tags": ["a", {"b": tr', {"city": "Paris", "tags": ["a", {"b": True}]}),
        ('{"days": 12', {"days": 12}),
        ('{"days": -', {"days": None}),
        ('{"city": "a\\', {"city": "a"}),
        ('{"city": "a\\u00', {"city": "a"}),
        ('{"city": "a" ', {"city": "a"}),
        ("{", {}),
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_arguments_that_were_cut_off_go_back(arguments: Any, meant: dict[str, Any]) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (message,) = normalize_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == meant


@pytest.mark.parametrize("arguments", ["Paris", "{broken", "[1]", "3", '{"a": 1} {', '{"a": b}'])
def test_arguments_without_meaning_are_refused(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls\[0\].function.arguments"):
        normalize_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])


def test_messages_without_content_are_empty(processor: TextProcessor) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "tool", "tool_call_id": "c", "content": "before its call"},
        {"role": "user", "content": None},
        {"role": "assistant", "content": None, "reasoning_content": None, "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "c", "content": None},
        {"role": "tool", "tool_call_id": "c"},
        {"role": "assistant", "content": [], "tool_calls": []},
    ]
    assert processor.chat_prompt(messages).count("<|im_start|>") == 8


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "", "content": "hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0]",
        ),
    ],
)
def test_a_message_at_fault_is_named(
    processor: TextProcessor, messages: list[Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        processor.chat_prompt(messages)
    assert caught.value.param == param


def test_half_a_surrogate_pair_is_refused(processor: TextProcessor) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        processor.encode("\ud800")


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    write_text_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(RequestError, match="/v1/completions"):
        TextProcessor.load(tmp_path, tmp_path).chat_prompt([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "content",
    [
        "[]", "{", '{"top_k": "many"}', '{"temperature": -5}', '{"temperature": 1e999}',
        '{"top_p": 0}', '{"min_p": 2}', '{"repetition_penalty": 0}', '{"max_new_tokens": 0}',
        '{"top_k": -7}', "[" * 100_000, '{"top_k": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_a_broken_generation_config_is_named(tmp_path: Path, content: str) -> None:
    write_text_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        TextProcessor.load(tmp_path, tmp_path)


def test_max_new_tokens_bounds_what_is_not_said(tmp_path: Path) -> None:
    write_text_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5}))
    processor = TextProcessor.load(tmp_path, tmp_path)
    request = processor.request("r", [1], SamplingParams(max_tokens=None), 100)
    assert request.params.max_tokens == 5


def test_a_template_can_be_given_with_variables(text_model: Path, tmp_path: Path) -> None:
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ mood }}"
    file = tmp_path / "own.jinja"
    file.write_text(text)
    for template in (text, str(file)):
        own = TextProcessor.load(
            text_model, text_model, template=template, template_variables={"mood": "calm"}
        )
        message = {"role": "user", "content": "a"}
        assert own.chat_prompt([message]) == "[a]calm"
        assert own.chat_prompt([message], variables={"mood": "wild"}) == "[a]wild"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("/nowhere.jinja", r"--chat-template /nowhere\.jinja: neither a file that can be read"),
        ("{% for %}", "--chat-template, line 1: "),
    ],
)
def test_a_template_that_is_none_is_refused(text_model: Path, template: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        TextProcessor.load(text_model, text_model, template=template)


def test_sampling_defaults_can_be_replaced(text_model: Path) -> None:
    def defaults(generation_config: str, **entries: Any) -> tuple[float, float, int]:
        loaded = TextProcessor.load(text_model, text_model, generation_config, sampling=entries)
        return loaded.defaults.temperature, loaded.defaults.top_p, loaded.defaults.top_k

    assert defaults("auto", temperature=0.1) == (0.1, 0.95, 20)
    assert defaults("vllm", top_k=3) == (1.0, 1.0, 3)
    with pytest.raises(CheckpointError, match="mood cannot be set; temperature, top_p"):
        defaults("auto", mood=1)
    with pytest.raises(CheckpointError, match=r"--override-generation-config: Expected `int`"):
        defaults("auto", top_k="three")


def test_without_a_tokenizer_prompts_are_token_ids(text_model: Path, tmp_path: Path) -> None:
    plain = TextProcessor.load(text_model, tmp_path, skip_tokenizer=True)
    request = plain.request("r", [1, 2, 3], SamplingParams(max_tokens=2), 20)
    assert (request.prompt, request.boundaries) == ([1, 2, 3], [])
    piece = plain.detokenizer(request.params).push([4, 5], "length")
    assert (piece.text, piece.token_ids) == ("", [4, 5])
    with pytest.raises(RequestError, match=r"--skip-tokenizer-init.*; send token ids"):
        plain.encode("Hello")


WRONG = (-5, 2**70, 1e300, "x", "", "{{", True, [], [1], [{"a": 1}], {}, {"a": 1})


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "config.json"])
def test_a_value_of_any_type_is_refused_in_one_line_or_works(tmp_path: Path, name: str) -> None:
    write_text_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / name
    content = json.loads(file.read_text())
    if name == "tokenizer_config.json":
        content |= {"chat_template": "{{ messages }}", "added": None}
    for key in (*content, None):
        for value in WRONG:
            file.write_text(json.dumps(value if key is None else {**content, key: value}))
            with contextlib.suppress(CheckpointError):
                assert TextProcessor.load(tmp_path, tmp_path).defaults.temperature >= 0
                continue
            with pytest.raises(CheckpointError) as refused:
                TextProcessor.load(tmp_path, tmp_path)
            message = str(refused.value)
            assert "\n" not in message
            assert str(tmp_path) in message


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_more_calls_than_the_context_has_tokens_are_refused(processor: TextProcessor) -> None:
    messages = [{"role": "assistant", "tool_calls": [CALL] * 30}]
    processor.check_chat(messages, 40)
    with pytest.raises(RequestError, match="at least 31 tokens"):
        processor.check_chat(messages, 30)


@pytest.mark.parametrize(
    ("message", "long"),
    [
        ({"role": "user", "content": "Hello"}, False),
        ({"role": "user", "content": "x" * 30_000}, True),
        ({"role": "user", "content": [{"type": "text", "text": "x"}] * 5}, False),
        ({"role": "user", "content": [{"type": "text", "text": "x"}] * 500}, True),
        ({"role": "user", "content": [{"type": "text", "text": "x" * 30_000}]}, True),
        ({"role": "assistant", "tool_calls": [CALL] * 3}, False),
        ({"role": "assistant", "tool_calls": [CALL] * 500}, True),
        ({"role": "a", "tool_calls": [{"function": {"arguments": "[" * 30_000}}]}, True),
        ({"type": "function_call", "arguments": "{" * 30_000}, True),
        (7, False),
    ],
)
def test_what_takes_long_to_render_is_known_before(message: Any, long: bool) -> None:
    assert is_long([message]) is long
    assert is_long([message] * 500)
