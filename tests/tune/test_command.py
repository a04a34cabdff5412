"""`millrace tune` with a mock server in the place of an engine, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from millrace import cli
from millrace.bench.measure.client_overhead import ClientOverhead
from millrace.bench.runs.options_from_flags import load_options
from millrace.common.http_client import Target
from millrace.tune import planner_seeds
from millrace.tune.options import TuneFlags
from millrace.tune.request import of_command_line, prepare
from millrace.tune.servers.load import client_bound
from millrace.tune.space.space_file import Circumstances, read_space, shipped_space
from millrace.tune.trials.journal import Began, Ended, read_journal
from millrace.tune.write_up import phase_seeds

MOCK = Path(__file__).parents[1] / "support" / "mock_replica.py"
SPACE = """
engine: mock
knobs:
  gap:
    about: seconds between chunks
    flag: --gap
    values: [0.02, 0.0]
    default: 0.0
  fail:
    words: ["", "--fail 'CUDA out of memory'"]
    values: [false, true]
    default: false
    riskier: {memory: up}
"""
HANGING = """
engine: mock
knobs:
  stuck:
    flag: --behaviour
    values: [ok, hang]
    default: ok
    riskier: {stability: up}
  gap:
    flag: --gap
    values: [0.0, 0.01, 0.02]
    default: 0.0
"""
LOAD = (
    *("--max-concurrency", "2", "--num-prompts", "4", "--random-input-len", "8"),
    *("--random-output-len", "5", "--num-warmups", "0", "--short-share", "1"),
    *("--accuracy-items", "0"),
)


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def test_a_study_of_a_server(
    tmp_path: Path, space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study"
    command = ["tune", "any", "--engine", "mock", "--space", str(space), "--dir", str(study)]
    command += ["--engine-command", f"{sys.executable} {MOCK}", *LOAD]
    command += ["--trials", "3", "--least-rounds", "1", "--most-rounds", "1", "--full-runs", "1"]
    assert cli.run(command) == 0
    said = capsys.readouterr()
    assert "out of memory at the start" in said.out
    assert "CUDA out of memory" in said.out
    assert (study / "logs" / "visit-000.log").exists()
    page = (study / "report.html").read_text()
    assert "What failed" in page
    assert "<script" not in page

    assert cli.run(["tune", "show", str(study), "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out)
    trials = {row["label"]: row for row in found["trials"]}
    assert len(trials) == 3
    (failed,) = (row for label, row in trials.items() if "fail on" in label)
    assert failed["failure"]["kind"] == "startup_oom"
    assert 0 < trials["gap 0.02"]["value"] < trials["defaults"]["value"]

    visits = sum(isinstance(record, Began) for record in read_journal(study))
    assert cli.run(["tune", "resume", str(study)]) == 0  # nothing is left to do
    assert sum(isinstance(record, Began) for record in read_journal(study)) == visits
    assert cli.run(command) == 2
    assert "goes on with it" in capsys.readouterr().err


def test_a_server_that_hangs_ends_its_trial_and_not_the_study(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(HANGING)
    study = tmp_path / "study"
    command = ["tune", "any", "--engine", "mock", "--space", str(space), "--dir", str(study)]
    command += ["--engine-command", f"{sys.executable} {MOCK}", *LOAD, "--hang-timeout", "1"]
    command += ["--trials", "6", "--least-rounds", "1", "--most-rounds", "1", "--full-runs", "1"]
    assert cli.run([*command, "--set", "stuck=hang"]) == 1  # every visit of this study hangs
    records = read_journal(study)
    outcomes = [record.outcome for record in records if isinstance(record, Ended)]
    assert outcomes
    assert all(one.failure is not None and one.failure.kind == "hang" for one in outcomes)
    assert max(one.seconds for one in outcomes) < 30.0


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--engine", "other"], "no search space ships"),
        (["--space", "missing.yaml"], "no such file"),
        (["--set", "max_num_seqs=7"], "max_num_seqs=7: use one of 8"),
        (["--set", "nothing=1"], "use NAME=VALUE"),
        (["--only", "nothing"], "no such knob"),
        (["--base-url", "http://127.0.0.1:1"], "go together"),
        (["--objective", "goodput"], "--goodput ttft:MS"),
        (["--objective", "per_dollar"], "needs --price"),
        (["--trials", "0"], "--trials 0: use 1 or more"),
        (["--most-rounds", "1"], "--most-rounds 1"),
        (["--short-share", "2"], "--short-share 2"),
        (["--plan-gpu", "b999"], "b999"),
        (["--hang-timeout", "0"], "--hang-timeout 0: use above 0"),
        (["--minutes", "nan"], "--minutes nan: use 0 or more"),
        (["--max-failed", "2"], "--max-failed 2: use 0 to 1"),
        (["--objective", "per_dollar", "--price", "0"], "--price 0: use above 0"),
        (["--accuracy", "nothing"], "use one of policy, math"),
        (["--goodput", "ttft:5"], "give --objective goodput too"),
        (["--plan-text", "nothing"], "unknown text 'nothing'"),
        (["--engine-command", "/nowhere/vllm serve"], "no such program"),
        (["--engine-command", "a 'b"], "No closing quotation"),
        (["--log-file", "x"], "give --base-url too"),
        (["--set", "drafts=1", "--set", "drafts=2"], "drafts is given twice"),
        (["--gpus", "64"], "--gpus 64"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "run", "millrace-mini", "--dir", str(tmp_path / "study"), *arguments]
    assert cli.run(command) == 2
    said = capsys.readouterr().err
    assert wrong in said
    assert said.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_model_that_is_not_there_is_said_before_the_first_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["tune", "nobody", "--dir", str(tmp_path / "study")]) == 2
    assert "neither a directory nor a shipped model" in capsys.readouterr().err


def test_other_engines_get_the_directory_of_a_model_that_ships(tmp_path: Path) -> None:
    engine = {"engine": "vllm", "engine_command": sys.executable, "dir": str(tmp_path)}
    for name, end in (("millrace-mini", "models/millrace-mini"), ("some/model", "some/model")):
        request = of_command_line(name, (), TuneFlags(**engine))
        served = prepare(request).served
        assert served.model.endswith(end)
        assert Path(served.model).is_dir() == (name == "millrace-mini")


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--plan-gpu", "b999"], "unknown GPU 'b999'"),
        (["--gpus", "0"], "--gpus 0: use 1 or more"),
        (["--engine", "other"], "the planner knows millrace, vllm, sglang"),
    ],
)
def test_what_the_planner_does_not_know_is_said(
    arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["tune", "write-up", "--plan-only", *arguments]) == 2
    assert wrong in capsys.readouterr().err


def test_show_and_resume_want_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("show", "resume"):
        assert cli.run(["tune", name, str(tmp_path)]) == 2
        assert "no study" in capsys.readouterr().err


def test_the_write_up_is_planned_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tune", "write-up", "--plan-only", "--engine", "vllm"]) == 0
    said = capsys.readouterr().out
    assert "96,023" in said
    assert "908 requests failed" in said
    assert "predicted, not measured" in said


def test_the_phases_of_the_write_up_become_settings() -> None:
    space, _ = read_space(shipped_space("vllm"), Circumstances(devices=8, gpus=True, sequence=1600))
    found = phase_seeds(space)
    assert len(found) == 8
    assert found[0].settings["tensor_parallel_size"] == 8
    assert found[4].settings["kv_cache_dtype"] == "fp8_e4m3"
    assert found[7].settings["gpu_memory_utilization"] == 0.95
    one, _ = read_space(shipped_space("vllm"), Circumstances(devices=1, gpus=True, sequence=1600))
    assert {one.devices_of(seed.settings) for seed in phase_seeds(one)} == {1}


def test_only_latencies_that_count_mind_the_clients_clock() -> None:
    plain = dict.fromkeys(ClientOverhead.__struct_fields__, 0)
    late, right = {"p50": 0.0, "p99": 40.0}, {"p50": 0.0, "p99": 0.0}
    shares = {"ttft": right, "itl": {"p50": 0.0, "p99": 0.3}}
    objects = {"lag_ms": {}, "error_ms": {"ttft": right, "itl": late}, "relative_error": shares}
    said = {"client_bound": True, "reasons": ["ITL p99 may be off"], "advice": None}
    client = msgspec.convert({**plain, **objects, **said}, ClientOverhead)
    assert client_bound(client, ("ttft", "itl")) == "ITL p99 may be off by 40.0 ms (30%)"
    assert client_bound(client, ("ttft",)) == ""
    assert client_bound(client, ()) == ""
    busy = msgspec.structs.replace(client, cpu_share=0.99)
    assert "99% of a core" in client_bound(busy, ())


def test_the_planner_is_asked_for_the_gpu_of_this_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eight, _ = read_space(shipped_space("vllm"), Circumstances(devices=8, gpus=True, sequence=1600))
    flags = TuneFlags(engine="vllm", max_concurrency=512)
    load = load_options(flags, Target("127.0.0.1", 0))
    monkeypatch.setattr(planner_seeds, "gpu_here", lambda: "b200")
    found = planner_seeds.seeds_of_planner("qwen3.5-27b", flags, eight, load)
    assert {seed.source for seed in found} == {"planner"}
    assert any(seed.settings["data_parallel_size"] == 8 for seed in found)
    assert planner_seeds.seeds_of_planner("nobody/knows-it", flags, eight, load) == []
    assert "no first settings by the planner" in capsys.readouterr().err
