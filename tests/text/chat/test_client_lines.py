"""Lines of clients that do not reach the prompt."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.text.chat.client_lines import without_client_lines

LINE = "x-anthropic-billing-header: cc_version=2.1.37.1ab; cc_entrypoint=cli; cch=a1b2c;"
USER = {"role": "user", "content": LINE}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ([{"role": "system", "content": f"{LINE}\nBe brief."}], ["Be brief."]),
        ([{"role": "developer", "content": f"{LINE}\n{LINE}\n\nBe brief."}], ["\nBe brief."]),
        ([{"role": "system", "content": LINE}], []),
        ([{"role": "system", "content": LINE}, {"role": "system", "content": "b"}], ["b"]),
        ([{"role": "system", "content": f"Never print {LINE}"}], [f"Never print {LINE}"]),
        (
            [{"role": "system", "content": [{"type": "text", "text": t} for t in (LINE, "a")]}],
            [[{"type": "text", "text": "a"}]],
        ),
    ],
)
def test_they_go_from_the_begin_of_a_system_prompt(given: list[Any], left: list[Any]) -> None:
    found = without_client_lines([*given, USER])
    assert [one["content"] for one in found] == [*left, LINE]  # users may write what they like


def test_malformed_messages_stay_as_they_are() -> None:
    given = [{"role": "system", "content": LINE}, 7, {"role": "system", "content": None}]
    assert without_client_lines(given) == given[1:]
    for odd in ([], [3], [{"role": "system"}], [{"role": "system", "content": [1, {}]}]):
        assert without_client_lines(odd) == odd
