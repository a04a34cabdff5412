"""The cost of a relayed chunk: this gateway, nginx, HAProxy, Envoy and two routers in Rust.

Every proxy is in front of the same mock (two replicas, C) and gets requests from the same client
(C). The cost is the CPU time of the proxy's own processes per chunk, which other work on the
machine changes little; runs are interleaved and repeated. A run with errors, silent streams, a gap
of over a second or too few chunks is rejected, counted and repeated.

    python benchmarks/relay_cost.py --peers /path/to/venv/bin --streams 256 1024 --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from millrace.common.http_client import Target
from millrace.common.sockets import free_port
from millrace.gateway.health.health_monitor import ReplicaSpec
from millrace.gateway.proxy_config import render

HERE = Path(__file__).resolve().parent
OURS = [sys.executable, "-m", "millrace.cli", "gateway"]
POLICIES = ("least_loaded", "round_robin", "random", "power_of_two", "prefix_aware")


def on_core(core: int | None, words: Sequence[str]) -> list[str]:
    """The command, kept on one core if one is named."""
    return list(words) if core is None else ["taskset", "-c", str(core), *words]


def build(directory: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("a C compiler named cc or gcc is needed to build mock and client")
    for name in ("mock", "client"):
        source = str(HERE / "relay" / f"{name}.c")
        subprocess.run([compiler, "-O2", "-o", str(directory / name), source], check=True)


def command(
    name: str, port: int, replicas: Sequence[int], work: Path, options: argparse.Namespace
) -> list[str]:
    """How a proxy is started; [] for one that is not installed here."""
    urls = [f"http://127.0.0.1:{replica}" for replica in replicas]
    specs = [ReplicaSpec(target=Target("127.0.0.1", replica)) for replica in replicas]
    if name.startswith("millrace"):
        more = {
            "millrace": [],
            "millrace, nothing kept": ["--max-kept-bytes", "0"],
            "millrace, 2 processes": ["--processes", "2"],
        }
        policy = ["--policy", name.rpartition(" ")[2]] if name.startswith("millrace policy") else []
        urls_said = ["--worker-urls", ",".join(urls)]
        paths = [str(options.before or ""), os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, paths))
        found = ["env", f"PYTHONPATH={path}"] if name == "millrace before" else []
        return [*found, *OURS, "--port", str(port), *urls_said, *more.get(name, policy)]
    if name in ("nginx", "haproxy", "envoy"):
        config = work / f"{name}.{'json' if name == 'envoy' else 'conf'}"
        config.write_text(render(name, specs, "127.0.0.1", port))
        program = shutil.which(name) or shutil.which(name, path=f"/usr/sbin:{options.peers}")
        if program is None:
            return []
        words = {
            "nginx": [
                "-c",
                str(config),
                "-g",
                f"daemon off; pid {work}/nginx.pid;",
                "-e",
                "stderr",
            ],
            "haproxy": ["-f", str(config)],
            "envoy": [
                "-c",
                str(config),
                "--concurrency",
                "1",
                "-l",
                "error",
                "--use-dynamic-base-id",
            ],
        }
        return [program, *words[name]]
    program = str(options.peers / name)
    if not Path(program).exists():
        return []
    launch = [program, "launch"] if name == "sglang-router" else [program]
    rest = ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    rest += ["--prometheus-port", str(free_port("127.0.0.1"))]
    return [*launch, *rest, "--worker-urls", *urls]


@contextlib.contextmanager
def running(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        for one in family(process.pid):
            with contextlib.suppress(psutil.Error):
                one.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            for one in family(process.pid):
                one.kill()
            process.wait()


def family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def cpu(pid: int) -> float:
    """CPU seconds of a process and all it started."""
    return sum(t.user + t.system for t in (p.cpu_times() for p in family(pid)))


def memory(pid: int) -> int:
    """Resident bytes of the same, shared pages counted once each."""
    return sum(p.memory_full_info().pss for p in family(pid))


def wait_until_up(port: int, seconds: float = 60.0) -> None:
    """Until it answers a GET, and has had a moment to look at its replicas."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        url = f"http://127.0.0.1:{port}/v1/models"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as got:
            if got.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"nothing answers on {port}")


def measure(
    work: Path, port: int, pid: int | None, streams: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One run. pid: the proxy; None for none."""
    idle = memory(pid) if pid else 0
    spread = (options.first + (options.chunks - 1) * options.gap) / 1000
    asked = (port, streams, options.seconds, options.prompt, int(options.ask_ids), spread, 1.0)
    words = [str(work / "client"), *map(str, asked)]
    with subprocess.Popen(on_core(options.pin[1], words), stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        client.stdout.readline()
        before = cpu(pid) if pid else 0.0
        time.sleep(options.seconds / 2)
        held = memory(pid) if pid else 0
        result: dict[str, Any] = json.loads(client.stdout.readline())
        after = cpu(pid) if pid else 0.0
    result["us_per_chunk"] = (after - before) / max(1, result["chunks"]) * 1e6
    result["kb_per_stream"] = (held - idle) / streams / 1024
    expected = streams / (options.gap / 1000) * result["seconds"]
    result["rejected"] = bool(
        result["errors"]
        or result["silent"]
        or result["longest_gap_ms"] > 1000
        or result["chunks"] < 0.85 * expected
    )
    return result


def one_run(
    name: str, streams: int, work: Path, options: argparse.Namespace
) -> dict[str, Any] | None:
    """Start mock and proxy afresh, measure, stop both. None for a proxy that is not here."""
    replicas, port = [free_port("127.0.0.1"), free_port("127.0.0.1")], free_port("127.0.0.1")
    # No words for the mock's kind makes the gateway keep nothing; the others do not look at it.
    mock = [str(work / "mock"), *map(str, replicas), str(options.first), str(options.gap)]
    mock = on_core(options.pin[1], [*mock, str(options.chunks), "millrace"])
    with running(mock, work / "mock.log"):
        time.sleep(0.2)
        if name == "direct":
            return measure(work, replicas[0], None, streams, options)
        words = command(name, port, replicas, work, options)
        if not words:
            return None
        words = on_core(options.pin[0], words)
        with running(words, work / f"{name.split(',')[0]}.log") as proxy:
            wait_until_up(port)
            time.sleep(options.settle)
            return measure(work, port, proxy.pid, streams, options)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [run for run in runs if not run["rejected"]]
    row: dict[str, Any] = {"runs": len(good), "rejected": len(runs) - len(good)}
    for key in ("us_per_chunk", "kb_per_stream", "ttft_p50_ms", "ttft_p99_ms"):
        values = [run[key] for run in good]
        row[key] = round(statistics.median(values), 2) if values else None
        if key == "us_per_chunk" and values:
            row["us_range"] = [round(min(values), 1), round(max(values), 1)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--first", type=int, default=50, help="ms to the first chunk")
    each = "one, or one for each of --streams"
    parser.add_argument("--gap", type=int, nargs="+", default=[50], help=f"ms, {each}")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64], help=f"an answer; {each}")
    parser.add_argument("--prompt", type=int, default=4096, help="bytes")
    parser.add_argument("--settle", type=float, default=1.0)
    parser.add_argument("--peers", type=Path, default=Path(sys.executable).parent)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--policies", action="store_true", help="compare our policies instead")
    parser.add_argument("--ask-ids", action="store_true", help="the client asks for token ids")
    parser.add_argument(
        "--pin", action="store_true", help="the proxy on core 1, the rest on core 0"
    )
    parser.add_argument("--before", type=Path, help="another checkout's src, measured too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.pin = (1, 0) if options.pin else (None, None)
    names = ["direct", "millrace", "millrace, nothing kept", "nginx", "haproxy", "envoy"]
    names += ["sglang-router", "vllm-router"]
    if options.before:
        names.append("millrace before")
    if options.policies:
        names = [f"millrace policy {policy}" for policy in POLICIES]
    names = [name for name in names if options.only is None or name in options.only]
    levels = len(options.streams)
    gaps, lengths = ((x * levels)[:levels] for x in (options.gap, options.chunks))
    options.levels = list(zip(options.streams, gaps, lengths, strict=True))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        build(work)
        for _ in range(options.rounds):
            for streams, gap, chunks in zip(options.streams, gaps, lengths, strict=True):
                options.gap, options.chunks = gap, chunks
                for name in random.sample(names, len(names)):
                    for _ in range(2):  # once more after a rejected run
                        run = one_run(name, streams, work, options)
                        if run is None:
                            break
                        results.setdefault(str(streams), {}).setdefault(name, []).append(run)
                        print(streams, name, json.dumps(run), flush=True)
                        if not run["rejected"]:
                            break
    table = {
        streams: {name: summary(runs) for name, runs in rows.items()}
        for streams, rows in results.items()
    }
    print(json.dumps(table, indent=2))
    if options.json:
        about = {"cores": os.cpu_count(), "load": os.getloadavg(), "options": vars(options)}
        text = json.dumps({"about": about, "table": table, "runs": results}, indent=2, default=str)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
