"""Finding models: by directory, or by the name of one that ships."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from millrace.errors import CheckpointError
from millrace.model_lookup import find_model, shipped_models


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two places with models; both know `twin`."""
    for place, name in (("one", "alpha"), ("one", "twin"), ("two", "twin")):
        directory = tmp_path / place / name
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
    (tmp_path / "two" / "unfinished").mkdir()
    places = [str(tmp_path / "one"), "", str(tmp_path / "two"), "/nowhere"]
    monkeypatch.setenv("MILLRACE_MODELS", os.pathsep.join(places))
    return tmp_path


def test_a_directory_is_itself(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf / "one")
    assert find_model("alpha") == shelf / "one" / "alpha"
    assert find_model(str(shelf / "two" / "twin")) == shelf / "two" / "twin"


def test_a_name_is_found_in_the_first_place(shelf: Path) -> None:
    assert find_model("twin") == shelf / "one" / "twin"
    assert {"alpha", "twin"} <= set(shipped_models())
    assert "unfinished" not in shipped_models()


def test_an_unknown_name_lists_what_there_is(shelf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"these ship: .*alpha.*twin"):
        find_model("beta")


def test_a_directory_without_a_config_is_no_model(shelf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        find_model(str(shelf / "two" / "unfinished"))
