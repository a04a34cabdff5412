"""Replicas loaded directly and through a gateway: both loads, the share that is lost, the table."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from millrace.bench.command import bench
from millrace.bench.runs.accuracy import Accuracy
from millrace.bench.runs.gateway_cost import (
    GatewayRow,
    gateway_fields,
    gateway_table,
    measure_gateway,
)
from millrace.errors import UserError
from millrace.gateway.admin.status import read_status
from tests.bench.runs.test_scaling import MOCK, options
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import run


def test_both_loads_are_of_the_size_of_the_fleet_and_nothing_is_left() -> None:
    steps: list[str] = []
    (row,) = run(measure_gateway(options(counts=[2], repeats=2), steps.append))
    assert row.replicas == 2
    assert [r["completed"] for r in row.every_run] == [12] * 4
    assert [r["max_concurrency"] for r in row.every_run] == [4] * 4
    assert row.accuracy == Accuracy(0.75, 8)
    order = [step.partition(", ")[2] for step in steps if "run" not in step]
    assert order == [
        *("direct", "through the gateway", "accuracy"),
        *("through the gateway", "direct"),  # the other way round
    ]
    assert not [c for c in psutil.Process().children(recursive=True) if MOCK[1] in c.cmdline()]


def test_a_running_gateway_is_measured_against_its_own_replicas() -> None:
    async def scenario() -> None:
        replicas = [await MockReplica(name=str(i)).start() for i in range(2)]
        async with gateway(*(replica.url for replica in replicas)) as (_, target):
            (row,) = await measure_gateway(options(), lambda step: None, url=str(target))
            assert row.replicas == 2
            picks = sum(row["picks"] for row in (await read_status(str(target)))["replicas"])
            assert [r["completed"] for r in row.every_run] == [12, 12]
            assert picks < sum(len(replica.bodies) for replica in replicas)
            assert min(len(replica.bodies) for replica in replicas) > 4
        for replica in replicas:
            await replica.stop()

    run(scenario())


def test_without_a_replica_there_is_nothing_to_measure() -> None:
    async def scenario() -> None:
        async with gateway() as (_, target):
            with pytest.raises(UserError, match="no replica that takes requests"):
                await measure_gateway(options(), lambda step: None, url=str(target))

    run(scenario())


def figures(speed: float, **more: Any) -> dict[str, Any]:
    names = ("median_ttft_ms", "median_tpot_ms", "p99_itl_ms", "max_concurrent_requests")
    return {"total_token_throughput": speed, "failed": 0, **dict.fromkeys(names, 8.0), **more}


def test_the_loss_is_the_median_of_pairs() -> None:
    """The speed of the machine drifts: medians of each load for itself would say 10%."""
    row = GatewayRow(replicas=2)
    row.direct = [figures(100.0), figures(50.0), figures(60.0)]
    row.runs = [figures(69.0), figures(34.5), figures(54.0, failed=1)]
    (fields,) = gateway_fields([row])
    assert fields["lost"] == pytest.approx(0.31)
    assert (fields["direct"], fields["gateway"], fields["failed"]) == (60.0, 54.0, 1)
    assert "| 31.0% |" in gateway_table([row])


@pytest.mark.parametrize("arguments", [[], ["m", "--url", "http://127.0.0.1:1"]])
def test_a_model_or_a_url(arguments: list[str]) -> None:
    got = CliRunner().invoke(bench, ["gateway", *arguments])
    assert isinstance(got.exception, UserError)
    assert "one of both" in str(got.exception)
