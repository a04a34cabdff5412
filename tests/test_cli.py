"""The command line: quick, and one line for whatever is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millrace import __version__, cli
from millrace.config import HELP, EngineArgs
from millrace.server.command import without_options
from millrace.server.options import SERVER_HELP, ServerOptions


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("serve", "gateway", "bench", "eval"))


@pytest.mark.parametrize("name", ["serve", "gateway", "bench", "eval"])
def test_every_listed_command_is_there(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.run([name, "--help"]) == 0
    assert "Usage: millrace " + name in capsys.readouterr().out


# What takes long to import, and what no help text needs.
HEAVY = (
    *("asyncio", "http.client", "httptools", "jinja2", "llguidance", "numpy", "prometheus_client"),
    *("rich", "ssl", "starlette", "tokenizers", "torch", "uvicorn", "uvloop", "zmq"),
)


@pytest.mark.parametrize(
    "command",
    [
        *("serve", "chat", "gateway", "gateway status", "gateway render"),
        *("bench", "bench serve", "bench sweep", "bench compare"),
        *(
            "bench report",
            "bench throughput",
            "bench selftest",
            "bench scaling",
            "bench parallelism",
            "eval",
            "batch",
            "doctor",
        ),
    ],
)
def test_help_imports_nothing_heavy(command: str) -> None:
    program = (
        "import sys; from millrace import cli; "
        f"status = cli.run({[*command.split(), '--help']!r}); "
        f"found = [name for name in {HEAVY!r} if name in sys.modules]; "
        "print(found, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_every_option_is_offered_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(EngineArgs.__struct_fields__) == set(HELP)
    assert set(ServerOptions.__struct_fields__) == set(SERVER_HELP)
    cli.run(["serve", "--help=all"])
    text = capsys.readouterr().out
    for name in (*EngineArgs.__struct_fields__, *ServerOptions.__struct_fields__):
        assert name == "model" or f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bake"], "millrace: No such command 'bake'"),
        (["serve"], "millrace serve: Missing argument 'MODEL'"),
        (["serve", "m", "--frobnicate"], "millrace serve: No such option '--frobnicate'"),
        (["serve", "m", "--port", "many"], "millrace serve: Invalid value for '--port'"),
        (["serve", "m", "--port", "70000"], "port 70000: use 0 to 65535"),
        (["serve", "m", "--replicas", "0"], "replicas 0: use 1 or more"),
        (["serve", "m", "--max-body-bytes", "0"], "max_body_bytes 0: use 1 or more"),
        (["serve", "m", "--max-bodies-bytes", "9"], "at least max_body_bytes, 33554432"),
        (["serve", "m", "--dtype", "int3"], "'int3' is not one of 'auto', 'float32'"),
        (["serve", "m", "--speculative-config", "{"], "'{' is not a JSON object"),
        (["serve", "m", "--speculative-config", '{"k": 1}'], "unknown field `k`"),
        (
            ["serve", "/nowhere", "--port=0"],
            "model '/nowhere': neither a directory nor a shipped model",
        ),
        (["serve", "/tmp", "--port=0"], "/tmp: no config.json there"),
        (["serve", "/nowhere", "--replicas", "2"], "neither a directory nor a shipped model"),
        (["serve", "m", "--host", "no such host"], "host 'no such host'"),
        (["serve", "m", "--stream-interval", "0"], "stream_interval 0: use 1 or more"),
        (["serve", "m", "--shutdown-timeout", "-1"], "shutdown_timeout -1.0: use 0 or more"),
        (["serve", "m", "--read-timeout", "inf"], "read_timeout inf: use 0 or more"),
        (["serve", "m", "--api-key", ""], "--api-key is empty; give it a key, or leave it out"),
        (["serve", "m", "--gateway-api-key", ""], "--gateway-api-key is empty"),
        (["serve", "m", "--cache-salt-by-api-key"], "--cache-salt-by-api-key needs --api-key"),
        (["serve", "m", "--replicas", "2", "--api-key", "\t"], "--api-key is empty"),
        (["serve", "m", "--ssl-keyfile", "k"], "--ssl-certfile is missing"),
        (["serve", "m", "--ssl-certfile", "/nowhere"], "--ssl-certfile /nowhere: No such file"),
        (["serve", "m", "--ssl-certfile", "/etc/hostname"], "--ssl-certfile /etc/hostname: "),
        (["serve", "m", "--allowed-origins", "[1]"], "is not a JSON list of texts"),
    ],
)
def test_a_wrong_command_gets_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in complaint(capsys, *arguments)


@pytest.mark.parametrize("variable", ["MILLRACE_API_KEY", "VLLM_API_KEY"])
def test_a_key_variable_that_is_empty_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, " ")
    said = complaint(capsys, "serve", "m")
    assert f"the variable {variable} is empty; give it a key, or leave it out" in said


def test_a_list_is_repeated_or_written_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServerOptions] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(
        "millrace.server.run.run_server", lambda args, options: seen.append(options) or 0
    )
    flags = ["--allowed-origins", '["https://a", "https://b"]', "--api-key", "x", "--api-key", "y"]
    assert cli.run(["serve", "m", "--max-server-restarts", "0", *flags]) == 0
    assert seen[0].allowed_origins == ["https://a", "https://b"]
    assert seen[0].api_key == ["x", "y"]


def test_nothing_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    assert "Usage: millrace" in capsys.readouterr().err


def test_options_become_engine_arguments(monkeypatch: pytest.MonkeyPatch, text_model: Path) -> None:
    seen: list[Any] = []

    def run_server(args: EngineArgs, options: ServerOptions) -> int:
        seen.extend([args, options])
        return 5

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("millrace.server.run.run_server", run_server)
    status = cli.run(
        [
            "serve", str(text_model), "--port", "0", "--served-model-name", "a",
            "--served-model-name", "b", "--no-enable-prefix-caching", "--max-num-seqs=3",
            "--async-scheduling", "--speculative-config",
            '{"method": "mtp", "num_speculative_tokens": 2}', "--max-server-restarts=0",
        ]
    )  # fmt: skip
    args, options = seen
    assert status == 5
    assert options == ServerOptions(port=0, max_server_restarts=0)
    assert (args.model, args.served_model_name) == (str(text_model), ["a", "b"])
    assert (args.enable_prefix_caching, args.async_scheduling) == (False, True)
    assert args.max_num_seqs == 3
    assert args.speculative_config.num_speculative_tokens == 2
    assert args.gpu_memory_utilization == EngineArgs(model="m").gpu_memory_utilization


def test_replicas_get_the_same_command_line(
    monkeypatch: pytest.MonkeyPatch, text_model: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "millrace.fleet.supervisor.run_replicas", lambda *args, **more: seen.append((args, more))
    )
    bodies = [f"--max-bodies-bytes={99 << 20}", "--otlp-traces-endpoint=http://c:4318/v1/traces"]
    arguments = ["serve", str(text_model), "--replicas", "2", "--port=81", *bodies]
    assert cli.run(arguments) == 0
    ((command, count, host, port), more) = seen[0]
    own = [str(text_model), *bodies, "--max-server-restarts", "0"]
    assert command[1:] == ["-m", "millrace.cli", "serve", *own]
    assert (count, host, port) == (2, "127.0.0.1", 81)
    assert (more["device"], more["gpus_per_replica"]) == ("auto", 1)
    assert more["gateway"].limits.max_bodies_bytes == 99 << 20
    assert more["gateway"].otlp_traces_endpoint == "http://c:4318/v1/traces"


def test_replicas_know_their_gateway_by_a_key_that_no_client_has(
    monkeypatch: pytest.MonkeyPatch, text_model: Path
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "millrace.fleet.supervisor.run_replicas", lambda *args, **more: seen.append(more)
    )
    command = ["serve", str(text_model), "--replicas", "2"]
    keys = ["--api-key", "a", "--api-key", "b", "--cache-salt-by-api-key"]
    for more in ([], keys, keys, [*keys, "--gateway-api-key", "c"]):
        assert cli.run([*command, *more]) == 0
    open_, first, second, named = ((s["gateway"].access, s["environment"]) for s in seen)
    assert (open_[0].api_key, open_[0].worker_api_key, open_[1]) == ([], None, {})
    for access, environment in (first, second, named):
        assert access.api_key == ["a", "b"]
        assert access.cache_salt_by_api_key
        assert environment == {"MILLRACE_GATEWAY_API_KEY": access.worker_api_key}
    assert len({"a", "b", first[0].worker_api_key, second[0].worker_api_key}) == 4
    assert named[0].worker_api_key == "c"


def test_options_with_values_are_cut_out() -> None:
    arguments = ["m", "--port", "1", "--x", "--replicas=3", "--replicasx", "2", "--replicas"]
    assert without_options(arguments, ("--port", "--replicas")) == ["m", "--x", "--replicasx", "2"]


@pytest.mark.parametrize(
    "module",
    [
        "millrace.cli",
        "millrace.server.command",
        "millrace.server.run",
        "millrace.gateway.command",
        "millrace.bench.command",
    ],
)
def test_nothing_but_an_engine_loads_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
