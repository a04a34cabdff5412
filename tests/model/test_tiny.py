"""Making a checkpoint from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.model import tiny


def test_the_command_writes_what_the_function_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tiny", str(tmp_path / "made"), "--seed", "5"])
    tiny.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "made")
    tiny.write_checkpoint(tmp_path / "wanted", seed=5)
    tiny.write_checkpoint(tmp_path / "other", seed=6)
    made, wanted, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("made", "wanted", "other")
    )
    assert made == wanted
    assert made["model.safetensors"] != other["model.safetensors"]
