"""Chat templates: the same prompt as transformers renders, and refusals that say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from millrace.errors import CheckpointError, RequestError
from millrace.text.messages import normalize_messages
from millrace.text.template import ChatTemplate, load_template
from tests.support.text_model import TEMPLATE, write_text_model

TRICKY = """\
{# a comment #}
{%- set ns = namespace(count=0) -%}
{% if tools %}
    {{ tools | tojson }}
    {{ tools | tojson(indent=2) }}
{% endif %}
{% for m in messages %}
    {% if loop.index0 > 3 %}{% break %}{% endif %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
  <{{ m['role'] }}> {{ m.content | trim }} {{ m.reasoning_content or '' }}
    {% generation %}{{ ns.count }}{% endgeneration %}

{% endfor %}
{{ eos_token }}{{ pad_token }}{{ bos_token }}{{ documents }}
{% if add_generation_prompt %}>>>{% endif %}
{{ {'k': 'ü<&>'} | tojson }} {{ extra | default('none') }}
"""

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "millrace-mini"

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Be <brief> & 'kind'."},
        {"role": "user", "content": " spaces \n\n kept? "},
        {"role": "assistant", "content": "ok", "reasoning": "because"},
        {"role": "user", "content": "日本 🦊"},
    ],
    [{"role": "user", "content": str(i)} for i in range(6)],
]


@pytest.mark.parametrize(
    "source",
    [TEMPLATE, TRICKY, (SHIPPED / "chat_template.jinja").read_text(encoding="utf-8")],
    ids=["plain", "tricky", "shipped"],
)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "many", "long"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False, "extra": "x"}])
def test_renders_what_transformers_renders(
    tmp_path: Path,
    source: str,
    chat: list[dict[str, Any]],
    prompt: bool,
    variables: dict[str, Any],
) -> None:
    write_text_model(tmp_path, source)
    oracle = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = load_template(tmp_path)
    assert ours is not None
    tools = [{"type": "function", "function": {"name": "f", "description": "ü"}}]
    assert ours.render(
        chat, add_generation_prompt=prompt, variables={**variables, "tools": tools}
    ) == oracle.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=prompt, tools=tools, **variables
    )


PREFILLS = [
    "<", "end", "|", "im_end", "<|im_end|>", "assistant", "It is ", " It is", "two\nlines\n", "",
    " ", "\n", "because</think>so", "</think>", "{{ x }}", "hi", "CONTINUE",
]  # fmt: skip


SHIPPED_SOURCE = (SHIPPED / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "as_parts"),
    [
        (TEMPLATE, False),
        (TEMPLATE, True),
        (TRICKY, False),
        (SHIPPED_SOURCE, False),
        (SHIPPED_SOURCE, True),
    ],
    ids=["plain", "plain parts", "tricky", "shipped", "shipped parts"],
)
@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("extra", [{}, {"reasoning_content": "thus"}], ids=["bare", "reasoned"])
def test_continues_where_transformers_continues(
    tmp_path: Path, source: str, prefill: str, extra: dict[str, str], as_parts: bool
) -> None:
    """The final message is continued at its end, whatever the template puts around it."""
    write_text_model(tmp_path, source)
    oracle = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = load_template(tmp_path)
    assert ours is not None
    content: Any = [{"type": "text", "text": prefill}] if as_parts else prefill
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content, **extra}]
    try:
        expected = oracle.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    except ValueError:  # the template leaves some of the content out
        with pytest.raises(RequestError, match="whose content the template shows"):
            ours.render(chat, add_generation_prompt=False, continue_final_message=True)
        return
    assert expected == ours.render(chat, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"role": "assistant", "content": None}, "needs a last message with a text"),
        ({"role": "assistant", "content": []}, "needs a last message with a text"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "the last message calls tools"),
    ],
)
def test_what_cannot_be_continued_is_refused(last: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        ChatTemplate(TEMPLATE, {}).render(
            [last], add_generation_prompt=False, continue_final_message=True
        )


def test_the_template_may_stand_in_the_tokenizer_config(tmp_path: Path) -> None:
    write_text_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert load_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 + 1 }}"}))
    template = load_template(tmp_path)
    assert template is not None
    assert template.render([]) == "2"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_template(tmp_path)
    assert template is not None
    assert template.render([]) == "d"


def test_parts_go_to_a_template_that_reads_them(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = ChatTemplate(TEMPLATE, {})
    assert template.takes_parts
    assert "user\nab<" in template.render([{"role": "user", "content": parts}])


def test_parts_are_joined_for_a_template_that_does_not(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert not template.takes_parts
    assert template.render([{"role": "user", "content": parts}]) == "a\nb"


def test_what_a_template_refuses_is_the_users_error() -> None:
    with pytest.raises(RequestError, match="Unexpected role wizard"):
        ChatTemplate(TEMPLATE, {}).render([{"role": "wizard", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages[7].content.x }}"],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template refuses"):
        ChatTemplate("{% if messages %}" + source + "{% endif %}", {}).render(
            [{"role": "user", "content": "x"}]
        )


def test_messages_cannot_be_replaced_by_variables() -> None:
    template = ChatTemplate("{{ messages | length }}{{ add_generation_prompt }}", {})
    hostile = {"messages": [], "add_generation_prompt": False}
    assert template.render([{"role": "user", "content": "x"}], variables=hostile) == "1True"


def test_a_template_with_an_error_names_its_line() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("ok\n{% if %}", {}, "model/chat_template.jinja")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": 1}, "must be a text, not dict"),
        (17, "must be a text, not int"),
        ([{"name": 1, "template": ""}], "each entry must be"),
        (["text"], "each entry must be"),
        ([{"name": "default", "template": 3}], "must be a text, not int"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "chat_template: "),
    ],
)
def test_a_template_of_a_wrong_type_is_refused_at_the_start(
    tmp_path: Path, source: object, message: str
) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": source}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_template(tmp_path)


def test_a_template_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        load_template(tmp_path)


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)


def test_an_endless_template_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.text.template.RENDER_SECONDS", 0.2)
    with pytest.raises(CheckpointError, match=r"over 0\.2 s for one short message"):
        ChatTemplate(ENDLESS, {})


def test_a_template_that_some_messages_make_endless_refuses_those(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("millrace.text.template.RENDER_SECONDS", 0.2)
    template = ChatTemplate("{% if messages | length > 1 %}" + ENDLESS + "{% endif %}", {})
    message = {"role": "user", "content": "x"}
    assert template.render([message]) == ""
    with pytest.raises(RequestError, match=r"takes over 0\.2 s"):
        template.render([message, message])
    assert template.render([message]) == ""


@pytest.mark.parametrize("expression", ["'a' * 10 ** 9", "[1] * 99999999", "9 ** 999"])
def test_a_template_makes_no_huge_values(expression: str) -> None:
    template = ChatTemplate(
        "{% if messages[0].content == 'go' %}{{ ("
        + expression
        + ") | string | length }}{% endif %}",
        {},
    )
    with pytest.raises(RequestError, match="more than"):
        template.render([{"role": "user", "content": "go"}])


def test_loops_know_their_place_and_length() -> None:
    source = (
        "{% for m in messages[::-1] %}{{ loop.index }}/{{ loop.length }}"
        "{{ ',' if not loop.last }}{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ loop.previtem is defined }}{% endfor %}"
        "{% for m in nothing %}{% else %}none{% endfor %}"
    )
    message = {"role": "user", "content": "x"}
    assert ChatTemplate(source, {}).render([message, message]) == "1/2,2/2a1FalseTruenone"


STRICT = """\
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
    {{- '[' ~ message.role ~ ']' ~ message.content }}
{%- endfor %}"""
FORGETFUL = """\
{%- if messages[0].role == 'system' %}{{- '[system]' ~ messages[0].content }}{% endif %}
{%- for message in messages if message.role != 'system' %}
    {{- '[' ~ message.role ~ ']' ~ message.content }}
{%- endfor %}"""
FREE = "{%- for one in messages %}{{- '[' ~ one.role ~ ']' ~ one.content }}{%- endfor %}"
MESSAGES = st.lists(
    st.builds(
        lambda role, text: {"role": role, "content": text},
        st.sampled_from(["system", "developer", "user", "assistant"]),
        st.sampled_from(["one", "two", "three", ""])
        | st.lists(
            st.builds(lambda text: {"type": "text", "text": text}, st.just("part")), max_size=1
        ),
    ),
    min_size=1,
    max_size=6,
)


@given(messages=MESSAGES, source=st.sampled_from([STRICT, FORGETFUL, SHIPPED_SOURCE, FREE]))
def test_no_system_message_is_refused_or_lost(messages: list[Any], source: str) -> None:
    """Each text is in the prompt, in order; what is no system message stays where it is."""
    template = ChatTemplate(source, {"eos_token": "", "pad_token": "", "bos_token": ""})
    given = normalize_messages(messages)
    text, at = template.render(given), 0
    if source == FREE:
        assert text == "".join(f"[{one['role']}]{joined(one)}" for one in given)
    for one in given if source != SHIPPED_SOURCE else ():
        at = text.index(joined(one), at) + len(joined(one))
    for one in (one for one in given if one["role"] == "system"):
        assert joined(one) in text


REMINDER = "<system-reminder>\n{}\n</system-reminder>"


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ("s1 s2 u1 a1 u2", "[system]s1\n\ns2[user]u1[assistant]a1[user]u2"),
        ("s1 u1 s2 a1", f"[system]s1[user]u1\n{REMINDER.format('s2')}[assistant]a1"),
        ("u1 a1 s1 s2 u2", f"[user]u1[assistant]a1[user]{REMINDER.format('s1')}\n"
         f"{REMINDER.format('s2')}\nu2"),
        ("s1 u1 a1 s2", f"[system]s1[user]u1[assistant]a1[user]{REMINDER.format('s2')}"),
        ("s1 u1 a1 s2 a2", f"[system]s1[user]u1[assistant]a1[user]{REMINDER.format('s2')}"
         "[assistant]a2"),
    ],
)  # fmt: skip
def test_a_later_system_message_stays_where_it_is(turns: str, text: str) -> None:
    """What lies before it is what it was in the request before, so that is found in the cache."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    given = [{"role": names[turn[0]], "content": turn} for turn in turns.split()]
    for source in (STRICT, FORGETFUL):
        assert ChatTemplate(source, {}).render(given) == text
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in given]
    assert ChatTemplate(STRICT, {}).render(parts) == text


def joined(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_a_final_system_message_can_be_continued() -> None:
    template = ChatTemplate(FREE, {})
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "[user]a[system]b"
