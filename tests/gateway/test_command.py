"""`millrace gateway` as a user calls it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from millrace.cli import run
from millrace.gateway.command import replica_specs

MOCK = str(Path(__file__).parents[1] / "support" / "mock_replica.py")
GATEWAY = [sys.executable, "-m", "millrace.cli", "gateway"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_it_serves_until_it_gets_a_signal(number: signal.Signals) -> None:
    replica = subprocess.Popen([sys.executable, MOCK], stdout=subprocess.PIPE, text=True)
    assert replica.stdout is not None
    url = f"127.0.0.1:{replica.stdout.readline().split()[-1]}"
    command = [*GATEWAY, "--worker-urls", f"{url},http://127.0.0.1:9", "--port", "0"]
    gateway = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert gateway.stderr is not None
        line = next(line for line in gateway.stderr if "gateway on" in line)
        assert "1 of 2 replicas healthy, policy prefix_aware. Try:" in line
        address = line.split("gateway on ")[1].split(",")[0]
        assert f"curl {address}/v1/chat/completions" in gateway.stderr.readline()
        with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer:
            assert json.load(answer)["data"][0]["id"] == "mock"
        gateway.send_signal(number)
        assert gateway.wait(10) == 0
    finally:
        for process in (gateway, replica):
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name at least one replica"),
        (["--worker-urls", "ftp://x"], "use a form like http://127.0.0.1:8000"),
        (["--worker-urls", "http://127.0.0.1:9/v2"], "a replica's URL has no path"),
        (["--worker-urls", "http://127.0.0.1:9?a=b"], "a replica's URL has no path"),
        (["--worker-urls", "127.0.0.1:9;size=2"], "use weight=, limit=, models= or role="),
        (["--worker-urls", "127.0.0.1:9", "--processes", "0"], "use 1 to 128"),
        (["--worker-urls", "127.0.0.1:9", "--ssl-keyfile", "k"], "go together"),
        (["--worker-urls", "127.0.0.1:9", "--api-key-file", "/no/file"], "No such file"),
        (["--worker-urls", "127.0.0.1:9", "--api-key", ""], "--api-key is empty; give it a key"),
        (
            ["--worker-urls", "127.0.0.1:9", "--api-key", "a", "--api-key", " "],
            "--api-key is empty",
        ),
        (["--worker-urls", "127.0.0.1:9", "--cache-salt-by-api-key"], "needs --api-key"),
        (["--worker-urls", "127.0.0.1:9", "--admin-key", ""], "--admin-key is empty"),
        (["--worker-urls", "127.0.0.1:9", "--worker-api-key", " "], "--worker-api-key is empty"),
        (["--worker-urls", "127.0.0.1:9", "--access-log", "/no/dir/log"], "No such file"),
        (["--worker-file", "/no/file"], "No such file"),
        (["--worker-dns", "name"], "use name:port"),
        (["render", "nginx", "--worker-urls", "http://a:1,https://b:2"], "http for all"),
        (["status", "127.0.0.1:9"], "no gateway answers"),
        (["--worker-urls", "127.0.0.1:9", "--policy", "best"], "'least_loaded', 'round_robin'"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["gateway", *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:1,b:2", [("a:1", ()), ("b:2", ())]),
        ("http://a:1/v1;models=x,y", [("a:1", ("x", "y"))]),
        ("http://a:1;models=x,http://b:2", [("a:1", ("x",)), ("b:2", ())]),
        ("http://a:1;models=x,y,https://b:2;models=z", [("a:1", ("x", "y")), ("b:2", ("z",))]),
        ("127.0.0.1:1;weight=2,127.0.0.1:2", [("127.0.0.1:1", ()), ("127.0.0.1:2", ())]),
        ("[::1]:1;models=x,[::2]:2", [("[::1]:1", ("x",)), ("[::2]:2", ())]),
        ("http://a:1;models=org/x:7b,y", [("a:1", ("org/x:7b", "y"))]),
    ],
)
def test_commas_separate_replicas_and_models(
    text: str, expected: list[tuple[str, tuple[str, ...]]]
) -> None:
    specs = replica_specs([text])
    assert [(spec.target.authority, spec.models) for spec in specs] == expected
