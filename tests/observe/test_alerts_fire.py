"""Planted faults fire their alerts in Debian's Prometheus, which scrapes real pages; what is well
stays quiet. All times of the rules are shortened sixtyfold: minutes to seconds, hours to minutes.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml

from millrace.common.sockets import free_port
from millrace.observe.rules import rule_files
from tests.support.observed.faulty_replica import FaultyReplica
from tests.support.observed.moving_replica import served

FAULTS = (
    "MillraceEngineDown", "MillraceEngineStuck", "MillraceKvCacheFull", "MillraceQueueGrowing",
    "MillracePreemptions", "MillraceNotFinite", "MillraceErrorBudgetFast",
    "MillraceFiguresContradict", "MillraceWorkAbovePeak",
)  # fmt: skip
GONE = "MillraceTargetDown"
BEFORE = 20.0  # seconds of health, in which nothing may fire
LIMIT = 60.0
SHORTER = {"m": "s", "h": "m"}
# Faults that follow from others: such as the power of an engine that does nothing.
ALSO = {
    "MillraceEngineStuck": {"MillraceFiguresContradict"},
    "MillraceErrorBudgetFast": {"MillraceErrorBudgetSlow"},
    "MillraceKvCacheFull": {"MillraceQueueGrowing"},
}


def shortened(rules: str) -> str:
    """Rules whose minutes are seconds and whose hours are minutes."""
    text = re.sub(r"\[(\d+)([mh])\]", lambda m: f"[{m[1]}{SHORTER[m[2]]}]", rules)
    text = text.replace("< 900", "< 1")  # a server's start
    text = re.sub(r"\[5s\]", "[6s]", text)  # of a scrape a second a rate needs some more
    return re.sub(r"(for: |offset )(\d+)([mh])", lambda m: f"{m[1]}{m[2]}{SHORTER[m[3]]}", text)


@contextlib.contextmanager
def prometheus(folder: Path, targets: dict[str, int]) -> Iterator[str]:
    """The address of a Prometheus that scrapes each port as a job of its own."""
    tool = shutil.which("prometheus")
    if tool is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    for name, text in rule_files().items():
        (folder / name).write_text(shortened(text))
    jobs = [
        {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        for name, port in targets.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / name) for name in rule_files()],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port("127.0.0.1")
    command = [
        tool, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--query.lookback-delta=5s",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def firing(address: str) -> dict[str, set[str]]:
    """Job -> alerts that fire."""
    query = urllib.parse.urlencode({"query": 'ALERTS{alertstate="firing"}'})
    with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=10) as response:
        found = msgspec.json.decode(response.read())["data"]["result"]
    alerts: dict[str, set[str]] = {}
    for sample in found:
        alerts.setdefault(sample["metric"].get("job", ""), set()).add(sample["metric"]["alertname"])
    return alerts


@pytest.mark.sweep
def test_planted_faults_fire_their_alerts_and_no_others(tmp_path: Path) -> None:
    replicas = {name: FaultyReplica() for name in (*FAULTS, GONE, "well")}
    with contextlib.ExitStack() as stack:
        gone = contextlib.ExitStack()
        ports = {
            name: (gone if name == GONE else stack).enter_context(served(replica.page))
            for name, replica in replicas.items()
        }
        address = stack.enter_context(prometheus(tmp_path, ports))
        time.sleep(BEFORE)
        assert firing(address) == {}
        for name in FAULTS:
            replicas[name].plant(name)
        gone.close()
        seen: dict[str, set[str]] = {}
        missing, limit = {*FAULTS, GONE}, time.monotonic() + LIMIT
        while missing and time.monotonic() < limit:
            time.sleep(1.0)
            for job, alerts in firing(address).items():
                seen.setdefault(job, set()).update(alerts)
            missing = {name for name in missing if name not in seen.get(name, ())}
    assert missing == set()
    extra = {job: alerts - {job} - ALSO.get(job, set()) for job, alerts in seen.items()}
    assert {job: alerts for job, alerts in extra.items() if alerts} == {}
