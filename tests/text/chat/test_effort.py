"""Clients' words of reasoning effort, and those that templates know."""

from __future__ import annotations

import pytest

from millrace.errors import RequestError
from millrace.text.chat.effort import EFFORTS, nearest_effort
from millrace.text.template import ChatTemplate

# It refuses what it does not know.
STRICT = """\
{%- set effort = reasoning_effort | default('medium') %}
{%- if effort not in ['low', 'medium', 'xhigh'] %}
    {{- raise_exception('reasoning_effort must be low, medium or xhigh') }}
{%- endif %}
{{- '<effort ' ~ effort ~ '>' ~ messages[0].content }}"""
# It takes what it does not know for its default.
LENIENT = """\
{%- if reasoning_effort == 'low' %}{{- 'briefly: ' }}
{%- elif reasoning_effort == "max" %}{{- 'long: ' }}{%- endif %}{{- messages[0].content }}"""
FREE = "Reasoning: {{ reasoning_effort | default('medium') }}\n{{ messages[0].content }}"
NONE = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("source", "known"),
    [(STRICT, ("low", "medium", "xhigh")), (LENIENT, ("low", "max")), (FREE, ()), (NONE, None)],
)
def test_what_a_template_knows_is_tried(source: str, known: tuple[str, ...] | None) -> None:
    assert ChatTemplate(source, {}).efforts == known


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("none", "low"), ("minimal", "low"), ("low", "low"), ("medium", "medium"),
        ("high", "xhigh"), ("xhigh", "xhigh"), ("max", "xhigh"),
    ],
)  # fmt: skip
def test_the_nearest_word_is_taken(wanted: str, found: str) -> None:
    assert nearest_effort(wanted, ("low", "medium", "xhigh")) == found


def test_a_word_that_nobody_knows_is_refused_with_those_that_work() -> None:
    with pytest.raises(RequestError, match=r"none, minimal, low, .* got 'huge'"):
        nearest_effort("huge", ("low",))
    assert nearest_effort("huge", ("huge",)) == "huge"
    assert [nearest_effort(word, EFFORTS) for word in EFFORTS] == list(EFFORTS)
