"""Search spaces: those that ship, files of the user, and how they are fitted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from millrace.errors import ConfigError
from millrace.tune.space.knobs import Space, label
from millrace.tune.space.no_go import Known, NoGo
from millrace.tune.space.space_file import Circumstances, read_space, shipped_space

EIGHT = Circumstances(devices=8, gpus=True, sequence=2000, concurrency=100)


def shipped(engine: str, where: Circumstances = EIGHT) -> Space:
    return read_space(shipped_space(engine), where)[0]


@pytest.mark.parametrize("engine", ["millrace", "vllm", "sglang"])
def test_a_shipped_space_is_fitted_to_what_is_there(engine: str) -> None:
    space = shipped(engine)
    assert space["tensor_parallel_size"].values == (1, 2, 4, 8)
    assert space["max_model_len"].values[0] == 2112  # 2,000 tokens, a template, whole blocks
    assert max(int(value or 0) for value in space["max_num_seqs"].values) == 128
    small = shipped(engine, Circumstances(devices=1, sequence=100, positions=4096))
    assert "replicas" not in small or small["replicas"].values == (1,)
    assert "gpu_memory_utilization" not in small
    assert small["max_model_len"].values == (192, 4096)  # no more than the model knows
    assert all(knob.default is None or knob.default in knob.values for knob in small.knobs)


def test_knobs_that_do_nothing_have_their_defaults() -> None:
    space = shipped("millrace")
    settings = space.normal({"drafts": 0, "draft_method": "ngram", "replicas": 1})
    assert settings["draft_method"] == "mtp"
    assert label(space, settings) == "defaults"


def test_a_knob_goes_with_the_one_that_it_needs() -> None:
    host = shipped("vllm", Circumstances(devices=2, sequence=100))
    assert "data_parallel_size" not in host
    assert "prefill_schedule_interval" not in host
    assert "policy" not in host
    assert "draft_method" in host


def test_experts_have_knobs_of_their_own_where_ranks_share_them() -> None:
    for engine, name, on in (
        ("millrace", "enable_expert_parallel", True),
        ("vllm", "enable_expert_parallel", True),
        ("sglang", "expert_parallel_size", 2),
    ):
        assert name not in shipped(engine)
        mixture = shipped(engine, msgspec.structs.replace(EIGHT, experts=True))
        alone = mixture.normal({name: on})
        assert alone[name] == mixture[name].default
        shared = mixture.normal({name: on, "tensor_parallel_size": 4})
        assert shared[name] == on
        assert mixture.problem(shared) == ""
    wide = mixture.normal({name: 8, "tensor_parallel_size": 4})
    assert "below expert_parallel_size" in mixture.problem(wide)


def test_a_host_without_gpus_has_its_own_likely_values_and_shares_out_its_cores() -> None:
    host = shipped("millrace", Circumstances(devices=2, sequence=100, concurrency=100))
    assert host["max_num_batched_tokens"].like == 2048
    assert "below mixed_prefill_tokens" in host.problem(host.normal({"mixed_prefill_tokens": 4096}))
    two = host.normal({"replicas": 2})
    assert host.problem(two) == ""
    assert host.counted(two) == host.counted(host.defaults) == 1


def test_what_a_server_refuses_is_not_tried_with_other_knobs() -> None:
    space = shipped("millrace")
    no_go = NoGo(space)
    said = "refused by the server: millrace serve: max_model_len 32768 is beyond the model's 4096"
    failed = space.normal({"max_model_len": 32768, "drafts": 1})
    no_go.add(Known(failed, "refused", 1, said))
    riskier = {"max_model_len": 131072, "drafts": 2, "draft_method": "suffix", "max_num_seqs": 64}
    assert no_go.blocks(space.normal(riskier))
    assert no_go.blocks(space.normal({"max_model_len": 8192, "drafts": 1})) is None
    no_go.add(Known(space.normal({"max_model_len": 4096, "replicas": 2}), "length", 2, "too long"))
    assert no_go.blocks(space.normal({"max_model_len": 2112}))


def test_more_devices_than_there_are_cannot_be_meant() -> None:
    space = shipped("vllm")
    settings = space.normal({"tensor_parallel_size": 8, "replicas": 2})
    assert "16 devices of 8" in space.problem(settings)
    few = space.normal({"max_num_batched_tokens": 2048, "max_num_seqs": 128})
    assert space.problem(few) == ""


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("knobs: {x: {values: [1]}}", "x: give its flag"),
        ("knobs: {x: {flag: --x}}", "values or a range"),
        ("knobs: {x: {flag: --x, values: [1, 1]}}", "twice"),
        ("knobs: {x: {flag: --x, values: [1], default: 2}}", "default 2 is none of"),
        ("knobs: {x: {values: [1, 2], words: [-a]}}", "as many words as values"),
        ("knobs: {x: {flag: --x, range: {low: 1, high: 4}}}", "a step above 0 or a factor"),
        ("knobs: {x: {flag: --x, values: [1], when: {y: [1]}}}", "no knob 'y'"),
        ("knobs: {x: {flag: --x, values: [1], hepls: {}}}", "hepls"),
        ("knobs: {x: {flag: x, values: [1]}}", "a flag begins with --"),
        ('knobs: {x: {values: [1], words: ["-a \'b"]}}', "No closing quotation"),
        ("knobs: {x: {flag: --x, values: [1], seen: words}}", "seen"),
        ("knobs: {x: {flag: --x, values: [1, 2], when: {x: [1]}}}", "names itself"),
        ("knobs: {x: {flag: --x, values: [a], devices: true}}", "use whole numbers"),
        ("nobs: {}", "nobs"),
        ("- 1", "knobs: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=wrong):
        read_space(path, EIGHT)


def test_a_range_is_spread(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "knobs:\n  a: {flag: --a, range: {low: 8, high: 64, factor: 2}}\n"
        "  b: {flag: --b, range: {low: 0.9, high: 0.94, step: 0.02}}\n"
    )
    space, _ = read_space(path, EIGHT)
    assert space["a"].values == (8, 16, 32, 64)
    assert space["b"].values == (0.9, 0.92, 0.94)


def test_an_engine_without_a_space() -> None:
    with pytest.raises(ConfigError, match="use millrace, sglang, vllm"):
        shipped_space("llama")


def test_what_is_as_risky_as_a_failure_is_ruled_out() -> None:
    space = shipped("vllm")
    no_go = NoGo(space)
    failed = {"max_num_seqs": 64, "gpu_memory_utilization": 0.94, "drafts": 1, "replicas": 8}
    no_go.add(Known(space.normal(failed), "memory", 3, "out of memory"))

    def ruled_out(**changes: object) -> bool:
        return no_go.blocks(space.normal({**failed, **changes})) is not None  # type: ignore[dict-item]

    assert ruled_out()
    assert ruled_out(max_num_seqs=128, gpu_memory_utilization=0.95)
    assert ruled_out(policy="random", replicas=4)  # neutral: each replica has its own memory
    assert not ruled_out(max_num_seqs=32)
    assert not ruled_out(kv_cache_dtype="fp8_e4m3", drafts=2)
    assert not ruled_out(tensor_parallel_size=2, replicas=4)
