"""Debian's Prometheus scrapes a moving metrics page; the queries of all panels have answers there.

vllm_panels.txt has what the panels of vLLM's dashboards ask, one query a line, by dashboard.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import msgspec
import pytest
import yaml

from millrace.common.sockets import free_port
from millrace.observe.dashboards import DASHBOARDS, document
from tests.support.observed.moving_replica import MovingReplica, served

VLLM_PANELS = Path(__file__).with_name("vllm_panels.txt")
VARIABLES = {
    "$__rate_interval": "4s", "$__range": "1m", '"$job"': '".*"', '"$model_name"': '".*"',
    '"$instance"': '".*"', '"$engine"': '".*"', "$ttft_slo": "1.0", "$tpot_slo": "0.1",
}  # fmt: skip
LIMIT = 60.0  # seconds until every query has an answer


@pytest.fixture(scope="module")
def replica() -> Iterator[int]:
    """The port where the moving page is."""
    with served(MovingReplica().page) as port:
        yield port


@pytest.fixture(scope="module")
def prometheus(replica: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that scrapes it, with the rules."""
    tool = shutil.which("prometheus")
    if tool is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port("127.0.0.1")
    rules = resources.files("millrace.observe") / "prometheus"
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms",
                   "evaluation_interval": "1s"},
        "rule_files": [str(rules / "recording.yml"), str(rules / "alerts.yml")],
        "scrape_configs": [
            {"job_name": "millrace", "static_configs": [{"targets": [f"127.0.0.1:{replica}"]}]}
        ],
    }  # fmt: skip
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [tool, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def answered(address: str, query: str) -> bool:
    """Whether a query has an answer of numbers. Raises AssertionError for one that is wrong."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            found = msgspec.json.decode(response.read())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}: {error.read().decode()}") from None
    except OSError:
        return False  # it starts
    samples = found["data"]["result"]
    return bool(samples) and any(sample["value"][1] != "NaN" for sample in samples)


def wait_for_all(address: str, queries: list[str]) -> list[str]:
    """The queries without an answer at the limit."""
    limit = time.monotonic() + LIMIT
    while queries and time.monotonic() < limit:
        queries = [query for query in queries if not answered(address, query)]
        if queries:
            time.sleep(0.5)
    return queries


def test_every_panel_of_our_dashboards_is_filled(prometheus: str) -> None:
    found = [
        target["expr"]
        for dashboard in DASHBOARDS
        for panel in document(dashboard)["panels"]
        for target in panel["targets"]
    ]
    assert len(found) > 40
    assert wait_for_all(prometheus, found) == []


def test_every_panel_of_vllms_dashboards_is_filled(prometheus: str) -> None:
    lines = VLLM_PANELS.read_text().splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    assert wait_for_all(prometheus, found) == []


def test_the_rules_are_evaluated_on_real_pages(prometheus: str) -> None:
    names = [
        rule["record"]
        for group in yaml.safe_load(
            (resources.files("millrace.observe") / "prometheus" / "recording.yml").read_text()
        )["groups"]
        for rule in group["rules"]
    ]
    assert wait_for_all(prometheus, names) == []


def test_dashboards_are_documents_with_places_for_all_panels() -> None:
    for dashboard in DASHBOARDS:
        made = json.loads(json.dumps(document(dashboard)))
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in made["panels"]]
        assert len(set(places)) == len(places) == len(dashboard.panels)
        assert made["uid"] == f"millrace-{dashboard.name}"
        assert {v["name"] for v in made["templating"]["list"]} >= {"datasource", "job"}
