"""`millrace batch` as a process: kills, a full disk, bad input."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

from tests.batch.counting_server import CountingServer, chat_line
from tests.support.live_server import wait_for

COUNT = 400


def command(folder: Path, *urls: str, **options: object) -> list[str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    files = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    servers = [word for url in urls for word in ("--base-url", url)]
    return [sys.executable, "-m", "millrace.cli", "batch", *files, *servers, *words]


def write_input(folder: Path, count: int = COUNT) -> None:
    lines = (json.dumps(chat_line(i)) + "\n" for i in range(count))
    (folder / "in.jsonl").write_text("".join(lines))


def rows(path: Path) -> list[dict[str, object]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_kills_lose_nothing_double_nothing_and_resend_what_was_in_flight(tmp_path: Path) -> None:
    write_input(tmp_path)
    draw = random.Random(7)
    in_flight, kills = 16, 0
    with CountingServer(seconds=0.02).running() as server:
        run = command(tmp_path, server.url, max_in_flight=in_flight)
        for _ in range(3):
            target = len(server.asked) + draw.randrange(30, 90)
            process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
            wait_for(lambda target=target: len(server.asked) >= target, timeout=60)  # type: ignore[misc]
            process.kill()
            process.wait()
            kills += 1
        subprocess.run(run, check=True, timeout=120)
        again = subprocess.run(run, check=True, timeout=60, capture_output=True, text=True)
    found = [row["custom_id"] for row in rows(tmp_path / "out.jsonl")]
    assert sorted(map(str, found)) == sorted(f"id-{i}" for i in range(COUNT))
    assert sum(server.asked.values()) - COUNT <= in_flight * kills
    assert set(server.keys) == set(server.keys) - {""}
    assert len(server.keys) == COUNT  # what was sent again had the same key
    assert "400 of 400 requests are done already" in again.stderr


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    write_input(tmp_path)
    with CountingServer().running() as server:
        run = command(tmp_path, server.url)
        limit = (300_000, 300_000)
        stopped = subprocess.run(
            run, capture_output=True, text=True, timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )  # fmt: skip
        assert stopped.returncode == 1, stopped.stderr
        assert "results cannot be kept" in stopped.stderr
        assert "run the same command again" in stopped.stderr
        subprocess.run(run, check=True, timeout=60)
    assert len({row["custom_id"] for row in rows(tmp_path / "out.jsonl")}) == COUNT


def test_bad_input_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    write_input(tmp_path, 3)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write(json.dumps({**chat_line(9), "url": "/v1/embeddings"}) + "\n")
    with CountingServer().running() as server:
        refused = subprocess.run(
            command(tmp_path, server.url), capture_output=True, text=True, timeout=60
        )
    assert refused.returncode == 2
    assert "line 4: url /v1/embeddings: only text is generated here" in refused.stderr
    assert not server.asked


def test_the_page_and_the_cost_say_how_far_it_is(tmp_path: Path) -> None:
    write_input(tmp_path, 20)
    page = tmp_path / "page.html"
    with CountingServer().running() as server:
        done = subprocess.run(
            command(tmp_path, server.url, input_price=1000, output_price=2000, page=page),
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert "20/20 done" in done.stderr
    assert "140 prompt tokens" in done.stderr
    assert "$0.26" in done.stderr
    assert "20/20 done" in page.read_text()
    assert server.url in page.read_text()
