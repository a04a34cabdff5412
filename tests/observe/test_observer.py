"""Samples of engines, exporters and hosts: kept across restarts and kills, on one clock."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.common.http_client import Target
from millrace.common.sockets import free_port
from millrace.errors import UserError
from millrace.observe.observer import Observer
from millrace.observe.progress import Progress
from millrace.observe.samples import store as stores
from millrace.observe.samples.clock import Clock, ClockOffset
from millrace.observe.samples.host import Host
from millrace.observe.samples.pages import kind_of, read
from millrace.observe.samples.sample import Row
from millrace.observe.samples.store import (
    Store,
    mark,
    read_events,
    read_meta,
    read_points,
    read_rows,
)
from tests.support.observed.fake_nvml import fake_nvml
from tests.support.observed.moving_replica import MovingReplica, served
from tests.support.running import eventually, run

DCGM = b"""# TYPE DCGM_FI_PROF_PIPE_TENSOR_ACTIVE gauge
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{gpu="0",hostname="node-1"} 0.4
DCGM_FI_DEV_POWER_USAGE{gpu="0",hostname="node-1"} 650.5
go_gc_duration_seconds{quantile="0"} 1
"""


def names(rows: list[Row], source: str) -> set[str]:
    return {row.name for row in rows if row.source == source}


def test_pages_are_recognised_and_what_says_the_same_twice_is_kept_once() -> None:
    text = MovingReplica().page().decode()
    assert kind_of(text) == "engine"
    found = {row.name for row in read(1.0, "a", text)}
    assert "millrace:time_to_first_token_seconds_bucket" in found
    assert "millrace:request_prompt_tokens_sum" in found
    assert "process_resident_memory_bytes" in found
    assert not [n for n in found if n.startswith("vllm:") or n.endswith("_created")]
    assert "millrace:request_prompt_tokens_bucket" not in found
    assert kind_of(DCGM.decode()) == "dcgm"
    assert kind_of("millrace_gateway_picks_total 1\nmillrace:steps_total 2\n") == "gateway"
    assert kind_of("node_load1 0.5\n") == "node"
    assert kind_of("hello\n") == ""
    vllm = list(read(1.0, "b", 'vllm:num_requests_running{model_name="m"} 3\n'))
    assert vllm == [Row(1.0, "b", "vllm:num_requests_running", '{"model_name":"m"}', 3.0)]


def test_a_gateways_page_has_engines_of_both_kinds() -> None:
    """Of vLLM's names those of a replica that has Millrace's are left out, and no others."""
    text = "".join(
        f'{name}{{replica="{replica}"}} 3\n'
        for name, replica in (
            ("millrace:engine_up", "a"), ("millrace:engine_up", "b"),
            ("millrace:num_requests_running", "a"), ("vllm:num_requests_running", "a"),
            ("vllm:num_requests_running", "b"), ("millrace_gateway_picks_total", "b"),
        )
    )  # fmt: skip
    found = [(row.name, json.loads(row.labels)["replica"]) for row in read(1.0, "g", text)]
    assert ("vllm:num_requests_running", "b") in found
    assert ("vllm:num_requests_running", "a") not in found
    assert len(found) == 5


def test_what_it_watches_may_end_and_come_back(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    port, first, second = free_port("127.0.0.1"), MovingReplica(), MovingReplica()

    async def scenario(exporter: int) -> None:
        targets = [Target("127.0.0.1", port), Target("127.0.0.1", exporter)]
        store = Store(tmp_path)
        with fake_nvml("gb10"):
            observer = Observer(targets, store, host=Host(), interval=0.02)
            task = asyncio.create_task(observer.run())
            with served(first.page, port):
                await eventually(lambda: first.count >= 3)
            await eventually(lambda: observer.watched[0].gone)
            with served(second.page, port):
                await eventually(lambda: second.count >= 3)
            observer.stop()
            await task

    with served(lambda: DCGM) as exporter:
        run(scenario(exporter))
    rows = list(read_rows(tmp_path))
    engine = f"127.0.0.1:{port}"
    assert {row.value for row in rows if row.name == "up" and row.source == engine} == {0.0, 1.0}
    assert {"millrace:steps_total", "scrape_seconds"} <= names(rows, engine)
    assert {
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
        "DCGM_FI_DEV_POWER_USAGE",
        "up",
        "scrape_seconds",
    } == (names(rows, f"127.0.0.1:{exporter}"))
    host = names(rows, "host")
    assert {"cpu_busy_seconds", "net_receive_bytes", "memory_used_bytes"} <= host
    assert {"gpu_power_watts", "gpu_memory_total_bytes"} <= host  # of GB10: the host's memory
    meta = read_meta(tmp_path)
    assert meta["gpus"] == {"0": "NVIDIA GB10"}
    assert [one["kind"] for one in meta["targets"].values()] == ["engine", "dcgm"]
    offset = meta["targets"][engine]
    assert abs(offset["clock_offset"]) <= offset["clock_error"] + 0.5  # the same clock


def test_an_engine_that_a_gateway_reports_too_is_counted_once(tmp_path: Path) -> None:
    engine = MovingReplica()
    gateway = b'millrace_gateway_picks_total 1\nmillrace:steps_total{replica="0"} 7\n'

    async def scenario(*ports: int) -> None:
        targets = [Target("127.0.0.1", port) for port in ports]
        observer = Observer(targets, Store(tmp_path), host=None, interval=0.02)
        task = asyncio.create_task(observer.run())
        await eventually(lambda: engine.count >= 3)
        observer.stop()
        await task

    with served(engine.page) as first, served(lambda: gateway) as second:
        run(scenario(first, second))
    found = names(list(read_rows(tmp_path)), f"127.0.0.1:{second}")
    assert found == {"millrace_gateway_picks_total", "up", "scrape_seconds"}


@pytest.mark.parametrize("arrow", [True, False])
def test_samples_come_back_as_they_were_and_runs_go_on(tmp_path: Path, arrow: bool) -> None:
    if arrow:
        pytest.importorskip("pyarrow")
    rows = [Row(float(t), "a", "up", '{"gpu":"0"}' if t % 2 else "", 0.25 * t) for t in range(4)]
    for part in (rows[:2], rows[2:]):  # the second as a later run would
        store = Store(tmp_path, as_text=not arrow)
        store.add(part)
        store.flush()
    (tmp_path / ".samples-000009.parquet.part").write_bytes(b"torn")  # of a kill
    assert list(read_rows(tmp_path)) == rows
    assert len(list(tmp_path.glob(f"samples-*.{store.suffix}"))) == 2


def test_samples_are_written_while_it_runs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add([Row(0.0, "a", "up", "", 1.0)])
    assert not list(tmp_path.glob("samples-*"))
    store.add([Row(stores.FLUSH_EVERY, "a", "up", "", 1.0)])
    assert len(list(tmp_path.glob("samples-*"))) == 1


def test_samples_wait_for_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MOST_ROWS", 3)
    store, full = Store(tmp_path), [True]

    def replace(source: str, target: str) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        Path(source).rename(target)

    monkeypatch.setattr(stores.os, "replace", replace)
    rows = [Row(t * stores.FLUSH_EVERY, "a", "up", "", 1.0) for t in range(6)]
    store.add(rows[:1])
    for row in rows[1:5]:
        with pytest.raises(UserError, match=r"samples-000001.*: No space left on device"):
            store.add([row])
    assert (store.waits, store.lost) == (True, 2)
    full[0] = False
    store.add(rows[5:])
    assert (store.waits, store.lost) == (False, 3)
    assert list(read_rows(tmp_path)) == rows[3:]


def test_only_the_figures_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """From files of both kinds, each series whole and in its order."""
    pytest.importorskip("pyarrow")
    rows = [
        Row(float(t), source, name, labels, 10.0 * t)
        for t in range(6) for source in "ab" for name in ("up", "down") for labels in ("", "{}")
    ]  # fmt: skip
    for start, arrow in ((0, True), (16, True), (32, False)):
        store = Store(tmp_path, as_text=not arrow)
        store.add(rows[start : start + 16])
        store.flush()
    found = read_points(tmp_path, {"up"})
    assert found.keys() == {("up", source, labels) for source in "ab" for labels in ("", "{}")}
    for t, values in found.values():
        assert t.tolist() == [0, 1, 2, 3, 4, 5]
        assert values.tolist() == [0, 10, 20, 30, 40, 50]


def test_a_line_says_what_runs() -> None:
    progress = Progress()

    def rows(t: float, tokens: float) -> list[Row]:
        running, out = "millrace:num_requests_running", "vllm:generation_tokens_total"
        return [
            Row(t, "a", "up", "", 1.0), Row(t, "b", "up", "", 0.0), Row(t, "a", running, "", 5.0),
            Row(t, "a", out, "", tokens), Row(t, "a", "millrace:gpu_power_watts", "", 650.0),
        ]  # fmt: skip

    progress.add(rows(0.0, 100.0))
    assert progress.line() == "1 of 2 targets answer; 5 running, 0 waiting; 650 W"
    progress.add(rows(10.0, 30_100.0))
    assert progress.line() == "1 of 2 targets answer; 3,000 tok/s out; 5 running, 0 waiting; 650 W"
    progress.add(rows(20.0, 10.0))  # it was started again
    assert "; 0 tok/s out" in progress.line()
    progress.add([])
    assert progress.line() == "this host is sampled"


def test_a_directory_without_samples_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples; give the --out of"):
        list(read_rows(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        Store(tmp_path / "file" / "below")


def test_phases_are_marked(tmp_path: Path) -> None:
    mark(tmp_path, 5.0, "load")
    mark(tmp_path, 2.0, "warm-up")
    assert read_events(tmp_path) == [(2.0, "warm-up"), (5.0, "load")]


def test_other_clocks_are_known_to_a_fraction_of_a_second() -> None:
    """A clock 90.25 s ahead, asked every 0.7 s, in answers of 20 ms."""
    from email.utils import formatdate

    offset, now = ClockOffset(), 1_000_000.0
    assert not offset.known
    for _ in range(40):
        there = int(now + 0.01 + 90.25)
        offset.add(formatdate(there, usegmt=True), now, now + 0.02)
        now += 0.7
    assert offset.offset == pytest.approx(90.25, abs=offset.error)
    assert offset.error < 0.1
    offset.add(formatdate(int(now), usegmt=True), now, now + 0.02)  # it was set
    assert abs(offset.offset) < 1.0
    offset.add("nonsense", now, now)


def test_the_observers_clock_does_not_jump() -> None:
    walls, passed = iter([100.0, 5000.0]), [10.0]
    clock = Clock(lambda: next(walls), lambda: passed[0])
    passed[0] = 12.0
    assert clock.now() == 102.0


def test_amd_gpus_and_infiniband_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    card = tmp_path / "sys/class/drm/card1/device"
    port = tmp_path / "sys/class/infiniband/mlx5_0/ports/1/counters"
    for path, text in {
        card / "mem_info_vram_total": "206141652992", card / "mem_info_vram_used": "1000",
        card / "gpu_busy_percent": "70", card / "hwmon/hwmon3/power1_average": "550000000",
        port / "port_rcv_data": "10", port / "port_xmit_data": "25",
        tmp_path / "proc/stat": "cpu  100 0 50 800 50 0 0 0 0 0\n",
        tmp_path / "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1234\n",
    }.items():  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with fake_nvml(count=0):
        host = Host(tmp_path)
        found = {(row.name, row.labels): row.value for row in host.read(1.0)}
        assert host.gpus() == {"amd0": "AMD GPU"}
    amd = '{"gpu":"amd0"}'
    assert found["gpu_power_watts", amd] == 550.0
    assert found["gpu_utilization_ratio", amd] == pytest.approx(0.7)
    assert found["gpu_memory_total_bytes", amd] == 206141652992.0
    assert found["net_transmit_bytes", '{"device":"mlx5_0/1"}'] == 100.0
    assert found["cpu_busy_seconds", ""] / found["cpu_total_seconds", ""] == pytest.approx(0.15)
    assert found["pressure_us", '{"resource":"cpu"}'] == 1234.0


def test_the_command_samples_until_it_is_told_to_end(tmp_path: Path) -> None:
    """One process: a run, a mark and the report behind it."""
    out = tmp_path / "run"
    with served(MovingReplica().page) as port:
        command = [sys.executable, "-m", "millrace", "observe", "--out", str(out)]
        process = subprocess.Popen(
            [*command, "--targets", f"http://127.0.0.1:{port}", "--interval", "0.1"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ,
        )  # fmt: skip
        assert process.stdout is not None
        assert "sampling 1 targets" in process.stdout.readline()
        run(eventually(lambda: (out / "meta.json").exists(), 60))
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (out / "report.html").exists()
    assert "report: " in said
    assert json.loads((out / "meta.json").read_text())["targets"]
