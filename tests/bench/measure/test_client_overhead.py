"""The generator's measure of itself."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest

from millrace.bench.load.process_pool import Outcome, ProcessRecords
from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.client_overhead import (
    bound_reasons,
    lateness,
    measure_client,
    timing_errors,
)
from millrace.bench.measure.metrics import summarize

MS = 1_000_000


def part(
    beacons: list[tuple[float, float]], chunks: list[float], cpu: float = 0.1
) -> ProcessRecords:
    """Beacons as (read at, late by) and one request's chunks, all in ms."""
    record = RequestTiming(
        index=0,
        scheduled_ns=0,
        start_ns=0,
        end_ns=round(chunks[-1] * MS),
        chunk_ns=array("q", [round(c * MS) for c in chunks]),
        input_tokens=1,
        output_tokens=len(chunks),
    )
    return ProcessRecords(
        records=[record],
        cpu_s=cpu,
        wall_s=1.0,
        parse_s=cpu / 2,
        read_ns=array("q", [round(at * MS) for at, _ in beacons]),
        lag_ns=array("q", [round(late * MS) for _, late in beacons]),
    )


def outcome(*parts: ProcessRecords) -> Outcome:
    records = [record for one in parts for record in one.records]
    return Outcome(list(parts), records, len(records), False)


def test_a_chunk_is_as_late_as_the_beacon_read_next() -> None:
    one = part([(10, 1), (20, 5), (30, 2)], [9, 10, 15, 31])
    assert lateness(one, one.records[0].chunk_ns).tolist() == [1, 1, 5, 2]


def test_a_backlog_is_worked_off_behind_the_beacons_that_showed_it() -> None:
    one = part([(10, 0), (50, 20), (50, 16), (54, 0)], [50, 51, 53, 60])
    assert lateness(one, one.records[0].chunk_ns).tolist() == [20, 19, 17, 0]


def test_first_chunks_and_gaps_are_off_by_the_lateness_at_their_times() -> None:
    errors = timing_errors([part([(10, 1), (20, 5), (30, 2)], [9, 19, 29])])
    assert errors["ttft"] == {"p50": 1, "p99": 1, "max": 1}
    assert errors["itl"]["max"] == pytest.approx(5.0)
    # No gap was on time: of 10 ms seen, at worst 5 and 5 had been there.
    assert errors["itl"]["p50"] == pytest.approx(5.0)


def test_gaps_on_time_say_what_the_others_would_have_been() -> None:
    chunks = [50.0 + 20 * i for i in range(100)]
    beacons = [(at, 0.1) for at in chunks]
    for i in range(50, 60, 2):  # five chunks come 15 ms late, so ten gaps are off
        chunks[i] += 15
        beacons[i] = (chunks[i], 15.0)
    errors = timing_errors([part(beacons, chunks)])
    assert errors["itl"]["p50"] == pytest.approx(0.0, abs=1e-6)
    assert errors["itl"]["p99"] == pytest.approx(15.0)


def test_lateness_that_moves_no_percentile_is_no_error_of_it() -> None:
    """One chunk of 400 is 3 ms late: its two gaps are off, the figures hardly."""
    chunks = [50.0 + 20 * i for i in range(400)]
    beacons = [(at, 3.0 if i == 50 else 0.0) for i, at in enumerate(chunks)]
    chunks[50] += 3
    beacons[50] = (chunks[50], 3.0)
    errors = timing_errors([part(beacons, chunks)])
    assert errors["itl"]["max"] == pytest.approx(3.0)
    assert errors["itl"]["p50"] == pytest.approx(0.0, abs=1e-6)
    assert errors["itl"]["p99"] < 0.5


def test_no_beacon_is_no_error_and_no_crash() -> None:
    assert timing_errors([part([], [9, 19])])["ttft"]["max"] == 0


def client(*parts: ProcessRecords, cores: int = 16) -> Any:
    made = outcome(*parts)
    return measure_client(made, summarize(made.records), cores=cores)


def test_a_client_with_time_to_spare_bounds_nothing() -> None:
    one = client(part([(10, 0.1), (50, 0.1)], [50, 100, 150]))
    assert (one.client_bound, one.advice, one.reasons) == (False, None, [])
    assert one.us_per_chunk == pytest.approx(1e6 * 0.1 / 3)
    assert one.parse_us_per_chunk == pytest.approx(1e6 * 0.05 / 3)


def test_a_full_core_is_told_how_many_processes_to_use() -> None:
    one = client(part([(10, 0.1)], [50, 100], cpu=0.97), part([(10, 0.1)], [50, 100], cpu=0.97))
    assert one.client_bound
    assert one.advice == "client-bound: use --processes 4"
    assert "97% of a core" in one.reasons[0]
    full = client(part([(10, 0.1)], [50, 100], cpu=0.97), cores=1)
    assert full.advice.startswith("client-bound: use --processes 2, on a machine of its own")


def test_a_client_that_is_idle_and_late_is_told_that_other_programs_use_the_cores() -> None:
    one = client(part([(40, 30), (200, 30)], [50, 100]))
    assert one.client_bound
    assert "other programs use the cores" in one.advice
    assert any("TTFT p50 may be off by 30.0 ms" in reason for reason in one.reasons)


def test_a_run_that_mostly_opens_connections_is_the_clients() -> None:
    """As with a server that closes each connection, over TLS: 26% of the time in the worst case."""
    one = part([(10, 0.1), (50, 0.1)], [50, 100, 150])
    slow = msgspec.structs.replace(one.records[0], connect_ns=50 * MS)
    found = client(msgspec.structs.replace(one, records=[slow]))
    assert found.client_bound
    assert found.connect_share == pytest.approx(0.25)
    assert found.reasons == [
        "opening connections took 25% of the requests' time, before their start"
    ]
    assert found.advice == (
        "client-bound: the server closes connections that could be used again; let it keep them "
        "open"
    )


def test_errors_that_no_server_shows_are_none() -> None:
    """Half a ms on a gap of half a ms is 100%, and still no bound."""
    errors = {"itl": {"p50": 0.5, "p99": 0.9, "max": 3.0}}
    assert bound_reasons([0.1], errors, {"itl": {"p50": 1.0, "p99": 1.8}}) == []
    errors = {"itl": {"p50": 2.0, "p99": 2.0, "max": 3.0}}
    assert len(bound_reasons([0.1], errors, {"itl": {"p50": 0.03, "p99": 0.04}})) == 1
