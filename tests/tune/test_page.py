"""What docs/tune.md says is what there is: commands, files, keys, knobs, flags."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import msgspec
import pytest
import yaml

from millrace.speculation import SpeculativeConfig
from millrace.tune.command import tune
from millrace.tune.options import TuneFlags
from millrace.tune.space.space_file import Circumstances, _KnobFile, read_space, shipped_space
from millrace.tune.write_up import phase_seeds

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8")
ONE = Circumstances(devices=1, gpus=True, sequence=1600, concurrency=256)


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == kind]


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found.group(1)


def commands() -> list[list[str]]:
    text = "".join(blocks("")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("millrace tune")]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[1:4]))
def test_every_command_is_one(words: list[str]) -> None:
    name, arguments = words[2], words[3:]
    if name not in tune.commands:
        name, arguments = "run", words[2:]
    tune.commands[name].make_context(name, arguments)  # raises for what it does not know


def test_the_space_that_is_shown_can_be_read(tmp_path: Path) -> None:
    (text,) = (one for one in blocks("yaml") if "knobs:" in one)
    path = tmp_path / "space.yaml"
    path.write_text(text)
    space, _ = read_space(path, msgspec.structs.replace(ONE, concurrency=0))
    assert space["max_num_seqs"].values[0] == 8


def test_the_schedule_of_drafts_that_is_shown_is_taken() -> None:
    (text,) = (one for one in blocks("yaml") if "speculative-config" in one)
    found = msgspec.convert(yaml.safe_load(text)["speculative-config"], SpeculativeConfig)
    assert found.num_speculative_tokens_per_batch_size


def test_every_key_of_a_knob_is_explained() -> None:
    table = section("The search space").partition("| key |")[2].partition("\n\n")[0]
    keys = set(re.findall(r"`(\w+)(?:: [^`]*)?`", table))
    assert set(_KnobFile.__struct_fields__) - {"about"} <= keys


def test_the_knobs_of_each_engine_are_there() -> None:
    table = section("The search space").partition("| | Millrace | vLLM | SGLang |")[2]
    rows = [line.split("|")[2:5] for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    where = Circumstances(devices=8, gpus=True, sequence=100, experts=True)
    for column, engine in enumerate(("millrace", "vllm", "sglang")):
        space, _ = read_space(shipped_space(engine), where)
        for row in rows:
            assert [name for name in re.findall(r"`(\w+)`", row[column]) if name not in space] == []


def test_every_flag_that_is_named_exists() -> None:
    own = {name.replace("_", "-") for name in TuneFlags.__struct_fields__}
    others = {"host", "port", "config", "out", "by", "plan-only", "tokens", "sections"}
    named = set(re.findall(r"`--([a-z][a-z0-9-]+)", PAGE))
    assert named - own - others - {"max-num-seqs"} == set()


def test_the_space_of_the_measurement_on_a_gpu_has_the_phases() -> None:
    space, _ = read_space(ROOT / "benchmarks" / "tune_h200.yaml", ONE)
    seeds = phase_seeds(space)
    assert len(seeds) == 7  # of one GPU: the first two have its whole node, which is one GPU
    assert [seed.settings["drafts"] for seed in seeds].count(0) == 2
    assert "gpu_memory_utilization" in space
