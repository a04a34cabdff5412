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
    with pytest.raises(CheckpointError, match=r"its own here: maker/model --revision v1"):
        find_model("maker/model@v1")


def test_a_directory_without_a_config_is_no_model(shelf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        find_model(str(shelf / "two" / "unfinished"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of a model: `main` names one, the tag `v1` the other."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model = tmp_path / "hub" / "models--Qwen--Qwen3.5-0.8B"
    for reference, commit in (("main", "a" * 40), ("v1", "b" * 40), ("refs/pr/1", "c" * 40)):
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        if commit[0] != "c":
            (snapshot / "config.json").write_text("{}")
        path = model / "refs" / reference
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return tmp_path / "hub"


def test_an_id_is_found_in_the_cache_of_hugging_face(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = hub / "models--Qwen--Qwen3.5-0.8B" / "snapshots"
    name = "Qwen/Qwen3.5-0.8B"
    assert find_model(name) == snapshots / ("a" * 40)
    assert find_model(name, "v1") == find_model(name, "b" * 40) == snapshots / ("b" * 40)
    monkeypatch.delenv("HF_HOME")
    assert find_model(name, download_dir=str(hub)) == snapshots / ("a" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert find_model(name) == snapshots / ("a" * 40)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("Qwen/Qwen3.5-2B",),
            r"not there in .*; get it with: millrace download Qwen/Qwen3.5-2B$",
        ),
        (
            ("Qwen/Qwen3.5-0.8B", "v9"),
            r"no revision 'v9' in .*\(there: main, refs/pr/1, v1\); .* --revision v9$",
        ),
        (("Qwen/Qwen3.5-0.8B", "../x"), r"no revision '\.\./x'"),
        (("Qwen/Qwen3.5-0.8B", "refs/pr/1"), r"revision 'refs/pr/1' without a config\.json"),
        (
            ("Qwen/Qwen3.5-0.8B", None, "/my cache"),
            r"not there in .* /my cache; .* --cache-dir '/my cache'$",
        ),
    ],
)
def test_an_id_that_is_not_in_the_cache_gets_the_command_for_it(
    hub: Path, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_model(*options)
