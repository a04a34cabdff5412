"""The steps of a report: their loads, their servers, and what a command line can ask for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millrace import cli
from millrace.report.plan import SECTIONS, Request, model_facts, steps_of
from millrace.report.sections.load import acceptance_steps, batch_load
from millrace.report.sections.versus import loads_of
from millrace.report.steps.profiles import PROFILES, fitted
from millrace.report.steps.texts import KINDS, messages

SHIPPED = Path(__file__).parents[2] / "models" / "millrace-mini"


def texts_of(load: Any) -> set[str]:
    return {msgspec.json.encode(one).decode() for one in load.texts}


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_no_load_sends_what_another_has_sent(name: str) -> None:
    """Else a prefix cache would answer, and differently in each server."""
    profile = PROFILES[name]
    loads = [
        batch_load(profile, streams, seed)
        for streams in profile.batches
        for seed in range(profile.repeats)
    ]
    loads += [
        load for number in range(profile.rounds) for load in loads_of(profile, number).values()
    ]
    loads = [load for load in loads if load.texts]
    sent = [texts_of(load) for load in loads]
    assert [len(texts) for texts in sent] == [len(load.texts) for load in loads]
    assert not any(a & b for a, b in itertools.combinations(sent, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_depend_on_seed_and_index_alone(kind: str) -> None:
    texts = [messages(kind, index, 5) for index in range(20)]
    assert texts == [messages(kind, index, 5) for index in range(20)]
    assert texts[7] != messages(kind, 7, 6)


@pytest.mark.parametrize("name", sorted(PROFILES))
@pytest.mark.parametrize("longest", [512, 2048, 4096, 40960, None])
def test_lengths_fit_the_model(name: str, longest: int | None) -> None:
    profile = fitted(PROFILES[name], longest)
    room = profile.max_model_len
    assert longest is None or room <= longest
    assert sum(profile.long_lengths) < room
    assert sum(profile.lengths) < room
    assert profile.prefix + 64 < room


def test_a_model_without_drafts_has_none_asked_for() -> None:
    facts = model_facts("millrace-mini", SHIPPED)
    assert facts.drafts
    assert facts.longest == 4096
    request = Request(model=facts, profile=PROFILES["smoke"], sections=list(SECTIONS)[:-1])
    without = msgspec.structs.replace(request, model=msgspec.structs.replace(facts, drafts=False))
    for one, drafts in ((request, True), (without, False)):
        servings = [step.serving for step in steps_of(one) if step.serving]
        assert all(("--speculative-config" in s.command) == drafts for s in servings)
    absent = acceptance_steps(PROFILES["smoke"], steps_of(request)[2].serving, False)  # type: ignore[arg-type]
    assert all(step.serving is None for step in absent)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "huge"], "use full, small, smoke"),
        (["--sections", "speed"], "use environment, client"),
        (["--sections", "versus"], "name the servers with --versus"),
        (["--sections", ","], "names none"),
        (["--versus", "tgi"], "use vllm, sglang"),
    ],
)
def test_what_cannot_work_is_said_with_what_would(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", "millrace-mini", "--dry-run", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", "millrace-mini", "--dry-run", "--sections", "long,client"]) == 0
    said = capsys.readouterr()
    assert "client/selftest: millrace bench selftest" in said.out
    assert "estimated from sizes" in said.out
    assert "profile " in said.err
    assert list(tmp_path.iterdir()) == []
