"""The command lines of settings."""

from __future__ import annotations

import json

import pytest

from millrace.errors import ConfigError
from millrace.tune.servers.command_line import (
    Served,
    engine_words,
    flags_of,
    fleet_content,
    shown_command,
)
from millrace.tune.space.space_file import Circumstances, read_space, shipped_space

WHERE = Circumstances(devices=8, gpus=True, sequence=2000)


def test_defaults_need_no_flags() -> None:
    for engine in ("millrace", "vllm", "sglang"):
        space, _ = read_space(shipped_space(engine), WHERE)
        assert flags_of(space, space.defaults) == []


def test_entries_of_one_flag_are_one_object() -> None:
    space, _ = read_space(shipped_space("millrace"), WHERE)
    words = flags_of(space, space.normal({"drafts": 2, "enable_prefix_caching": False}))
    at = words.index("--speculative-config")
    assert json.loads(words[at + 1]) == {"num_speculative_tokens": 2, "method": "mtp"}
    assert "--no-enable-prefix-caching" in words


def test_vllm_and_sglang_start_by_the_fleets_drivers() -> None:
    space, _ = read_space(shipped_space("vllm"), WHERE)
    settings = space.normal({"max_num_seqs": 64, "drafts": 1})
    served = Served(engine="vllm", model="m", arguments=("--seed", "3"), program="/opt/vllm")
    words = engine_words(served, space, settings)
    assert words[:3] == ["/opt/vllm", "serve", "m"]
    assert words[words.index("--max-num-seqs") + 1] == "64"
    assert words[-2:] == ["--seed", "3"]
    space, _ = read_space(shipped_space("sglang"), WHERE)
    served = Served(engine="sglang", model="m", program="python -m sglang.launch_server")
    words = engine_words(served, space, space.normal({"drafts": 2}))
    assert words[words.index("--speculative-num-draft-tokens") + 1] == "3"


def test_a_server_of_the_users_own_needs_its_program() -> None:
    space, _ = read_space(shipped_space("millrace"), WHERE)
    with pytest.raises(ConfigError, match="--engine-command"):
        engine_words(Served(engine="mine", model="m"), space, space.defaults)


def test_replicas_stand_behind_a_gateway() -> None:
    space, _ = read_space(shipped_space("millrace"), WHERE)
    settings = space.normal({"replicas": 4, "tensor_parallel_size": 2, "policy": "round_robin"})
    served = Served(engine="millrace", model="m", of_trials=("--max-engine-restarts", "0"))
    content = fleet_content(engine_words(served, space, settings), space, settings, 8123)
    assert content["replicas"] == 4
    assert content["gpus_per_replica"] == 2
    assert content["policy"] == "round_robin"
    assert content["port"] == 8123
    assert shown_command(served, space, settings) == (
        "millrace serve m --replicas 4 --policy round_robin --tensor-parallel-size 2"
    )


def test_sglang_gets_its_method_with_its_drafts_and_not_without() -> None:
    space, _ = read_space(shipped_space("sglang"), WHERE)
    words = flags_of(space, space.normal({"drafts": 2}))
    assert words[words.index("--speculative-algorithm") + 1] == "NEXTN"
    assert words[words.index("--speculative-num-steps") + 1] == "2"
    words = flags_of(space, space.normal({"drafts": 2, "draft_method": "ngram"}))
    assert words[words.index("--speculative-algorithm") + 1] == "NGRAM"
    assert flags_of(space, space.normal({"draft_method": "ngram"})) == []


def test_vllm_multiplies_engines_by_its_own_flag_or_by_replicas() -> None:
    space, _ = read_space(shipped_space("vllm"), WHERE)
    own = space.normal({"data_parallel_size": 4, "replicas": 2})
    assert flags_of(space, own) == ["--data-parallel-size", "4"]
    assert space.devices_of(own) == 4  # replicas stand back
    served = Served(engine="vllm", model="m", program="/opt/vllm")
    behind = space.normal({"replicas": 2})
    command = engine_words(served, space, behind)
    assert fleet_content(command, space, behind, 8000)["replicas"] == 2
