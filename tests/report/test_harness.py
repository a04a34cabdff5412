"""lm-evaluation-harness is run as it is: its arguments, its results, its failures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from millrace.common.http_client import Target
from millrace.errors import UserError
from millrace.report.sections.accuracy import Harness, harness_steps
from millrace.report.steps.profiles import PROFILES
from millrace.report.steps.step import AbsentError, ModelFacts, Place, Serving, Step
from tests.support.running import run

PROGRAM = """
import json, pathlib, sys
value = lambda name: sys.argv[sys.argv.index(name) + 1]
if value("--tasks") == "bad":
    sys.exit("no task named bad")
folder = pathlib.Path(value("--output_path")) / "some-model"
folder.mkdir()
(folder / "results_2026.json").write_text(json.dumps({"results": {"t": sys.argv[1:]}, "x": 1}))
"""
SERVING = Serving(name="served", command=("serve",))


def step(harness: Harness, client: str = "local-completions") -> Step:
    steps = harness_steps(harness, PROFILES["smoke"], SERVING)
    return next(one for one in steps if one.name == f"accuracy/{client}")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    facts = ModelFacts(name="mini", directory=tmp_path, longest=None, drafts=False, text_only=True)
    return Place(
        target=Target("127.0.0.1", 9), directory=tmp_path, model=facts, stop=None,
        profile=PROFILES["smoke"], start_limit=1.0, say=lambda line: None,
    )  # fmt: skip


@pytest.fixture
def command(tmp_path: Path) -> str:
    path = tmp_path / "lm_eval.py"
    path.write_text(PROGRAM)
    return f"{sys.executable} {path}"


def test_both_of_its_clients_are_run(place: Place, command: str) -> None:
    harness = Harness(command=command, completions=("a", "b"), chat=("c",), limit=7)

    async def results(client: str) -> Any:
        return await step(harness, client).work(place)

    found = run(results("local-completions"))
    assert "x" not in found
    said = " ".join(found["results"]["t"])
    assert "base_url=http://127.0.0.1:9/v1/completions" in said
    assert "--tasks a,b --limit 7" in said
    chat = " ".join(run(results("local-chat-completions"))["results"]["t"])
    assert "base_url=http://127.0.0.1:9/v1/chat/completions" in chat
    assert "--apply_chat_template" in chat


def test_what_it_says_when_it_fails(place: Place, command: str) -> None:
    async def work() -> Any:
        return await step(Harness(command=command, completions=("bad",))).work(place)

    with pytest.raises(UserError, match="ended with status 1: no task named bad"):
        run(work())


def test_without_it_no_server_is_started_for_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    absent = step(Harness())
    assert absent.serving is None

    async def work() -> Any:
        return await absent.work(place)

    with pytest.raises(AbsentError, match="pip install"):
        run(work())
