"""Other servers' command lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from millrace.errors import ConfigError
from millrace.fleet.drivers import engine_command
from millrace.server.command import serve

MOCK = Path(__file__).parents[1] / "support" / "mock_replica.py"

GIVEN = {
    "served_model_name": ["name"],
    "max_model_len": 4096,
    "max_num_seqs": 8,
    "kv_cache_dtype": "fp8",
    "enable_prefix_caching": False,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
    "tensor_parallel_size": 2,
    "enforce_eager": True,
    "replicas": 3,
    "policy": "prefix_aware",
}


def test_options_of_vllm() -> None:
    command = engine_command("vllm", "some/model", GIVEN, own="--swap-space 4", program="/opt/vllm")
    assert command[:3] == ["/opt/vllm", "serve", "some/model"]
    said = dict(zip(command[3::2], command[4::2], strict=False))
    assert said["--served-model-name"] == "name"
    assert "--no-enable-prefix-caching" in command
    assert "--enforce-eager" in command
    at = command.index("--speculative-config")
    assert json.loads(command[at + 1])["num_speculative_tokens"] == 2
    assert command[-2:] == ["--swap-space", "4"]
    assert not {"--replicas", "--policy"} & set(command)


def test_options_of_sglang() -> None:
    command = engine_command(
        "sglang", "some/model", GIVEN, program="python -m sglang.launch_server"
    )
    text = " ".join(command)
    assert text.startswith("python -m sglang.launch_server --model-path some/model")
    for words in (
        "--context-length 4096",
        "--max-running-requests 8",
        "--kv-cache-dtype fp8_e4m3",
        "--disable-radix-cache",
        "--speculative-num-draft-tokens 3",
        "--tp-size 2",
        "--disable-cuda-graph",
    ):
        assert words in text


def test_what_has_no_counterpart_or_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="--snapshot-interval has no counterpart in vllm"):
        engine_command("vllm", "m", {"snapshot_interval": 64}, program="vllm")
    with pytest.raises(ConfigError, match="--engine-command"):
        engine_command("sglang", "m", {})


def test_the_command_starts_the_other_server_behind_the_gateway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    environments: list[dict[str, str]] = []

    def start(command: list[str], count: int, *_: object, **more: Any) -> None:
        started.append([*command, str(count)])
        environments.append(more["environment"])

    monkeypatch.setattr("millrace.fleet.supervisor.run_replicas", start)
    program = f"{sys.executable} {MOCK}"
    arguments = ["m", "--engine", "vllm", "--engine-command", program, "--max-model-len", "99"]
    arguments += ["--otlp-traces-endpoint", "http://c:4318/v1/traces"]
    done = CliRunner().invoke(serve, [*arguments, "--replicas", "2", "--engine-args", "--x 1"])
    assert done.exception is None, done.output
    assert started == [
        [sys.executable, str(MOCK), "serve", "m", "--max-model-len", "99",
         "--otlp-traces-endpoint", "http://c:4318/v1/traces", "--x", "1", "2"]
    ]  # fmt: skip
    assert environments == [{"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}]
