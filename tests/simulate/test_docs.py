"""The examples of docs/simulate.md run as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from millrace.cli import run
from millrace.simulate.flags import SKIPPED, SimulateFlags

PAGE = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FILES = re.compile(r"cat > (\S+) <<'END'\n(.*?)^END\n", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_runs(
    block: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.findall(block):
        Path(name).write_text(text, encoding="utf-8")
    commands = FILES.sub("", block).replace("\\\n", " ").splitlines()
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "millrace"
        assert run(arguments) == 0
        assert "0 failed" in capsys.readouterr().out


def test_the_flags_of_the_page_exist() -> None:
    known = {name.replace("_", "-") for name in set(SimulateFlags.__struct_fields__) - SKIPPED}
    named = {name.removeprefix("no-") for name in re.findall(r"--([a-z][a-z-]+)", PAGE)}
    assert named <= known | {"ignore-eos"}
