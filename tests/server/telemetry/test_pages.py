"""The endpoints that generate nothing, and the headers of all."""

from __future__ import annotations

import math
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from millrace import __version__
from tests.support.live_server import LiveServer

# What dashboards made for vLLM read.
VLLM_NAMES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_success",
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:spec_decode_num_accepted_tokens_per_pos",
)


def test_health_and_version(http: httpx.Client) -> None:
    health = http.get("/health").json()
    assert health["status"] == "ok"
    assert re.fullmatch("[0-9a-f]{8}", health["response_tag"])
    assert http.head("/health").status_code == 200
    assert http.get("/version").json() == {"version": __version__}


def test_metrics_are_well_formed_and_complete(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"prompt": "hello"})
    families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    assert set(VLLM_NAMES) <= set(families)
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0.25
    positions = families["vllm:spec_decode_num_accepted_tokens_per_pos"].samples
    assert [sample.labels["position"] for sample in positions] == ["0", "1"]
    for family in families.values():
        if family.name.startswith(("vllm:", "millrace:")):
            assert {sample.labels["model_name"] for sample in family.samples} == {"fake"}


def test_a_request_moves_the_metrics(http: httpx.Client, server: LiveServer) -> None:
    names = {
        "millrace:generation_tokens_total": 9,
        "millrace:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 8,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:request_success_total": 1,
        "vllm:request_generation_tokens_sum": 9,
    }
    before = {name: server.metric(name) for name in names}
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 9})
    assert {name: server.metric(name) - before[name] for name in names} == names


def test_several_outputs_of_a_prompt_are_one_request_with_a_longest_output(
    http: httpx.Client, server: LiveServer
) -> None:
    names = {
        "vllm:request_params_n_sum": 2,
        "vllm:request_params_n_count": 1,
        "vllm:request_max_num_generation_tokens_sum": 9,
        "vllm:request_max_num_generation_tokens_count": 1,
        "vllm:request_generation_tokens_count": 2,
    }
    before = {name: server.metric(name) for name in names}
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 9, "n": 2})
    assert {name: server.metric(name) - before[name] for name in names} == names


def test_an_answer_that_a_stop_text_ends_is_a_success(
    http: httpx.Client, server: LiveServer
) -> None:
    page = 'vllm:request_success_total{engine="0",finished_reason="%s",model_name="fake"}'

    def count(reason: str) -> float:
        rows = http.get("/metrics").text.splitlines()
        return sum(float(row.split()[-1]) for row in rows if row.startswith(page % reason))

    before = count("stop"), count("abort")
    body = {"prompt": "hello there", "max_tokens": 400, "stop": "hello"}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["stop_reason"] == "hello"
    assert (count("stop"), count("abort")) == (before[0] + 1, before[1])


def test_waiting_requests_have_a_reason(http: httpx.Client) -> None:
    page = http.get("/metrics").text
    pattern = r"^vllm:num_requests_waiting_by_reason\{.*reason=\"(\w+)\".*\} (\S+)$"
    rows = dict(re.findall(pattern, page, re.MULTILINE))
    assert set(rows) == {"capacity", "deferred"}
    assert re.search(r'^vllm:admission_rejections_total\{.*"max_num_queued_reqs"', page, re.M)


def test_histogram_buckets_are_cumulative(http: httpx.Client) -> None:
    page = http.get("/metrics").text
    pattern = r"^millrace:e2e_request_latency_seconds_bucket{.*le=\"(.*?)\".*} (\S+)$"
    rows = [(float(le), float(count)) for le, count in re.findall(pattern, page, re.MULTILINE)]
    assert rows == sorted(rows)
    assert rows[-1][0] == math.inf


def test_the_request_id_comes_back(http: httpx.Client) -> None:
    headers = {"X-Request-Id": "mine-7"}
    for answer in (
        http.post("/v1/completions", json={"prompt": "hello"}, headers=headers),
        http.post("/v1/completions", json={"prompt": "hello", "stream": True}, headers=headers),
        http.post("/v1/completions", json={}, headers=headers),
        http.get("/nothing", headers=headers),
    ):
        assert answer.headers["x-request-id"] == "mine-7"


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    ids = {http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert http.get("/health", headers={"X-Request-Id": "x" * 257}).headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "needed"), [("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")]
)
def test_the_openapi_document_describes_the_endpoints(
    http: httpx.Client, path: str, needed: str
) -> None:
    document = http.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert {"temperature", "max_tokens", "stop"} <= set(schema["properties"])
    assert schema["required"] == [needed]


def test_every_reference_in_the_openapi_document_resolves(http: httpx.Client) -> None:
    text = http.get("/openapi.json").text
    names = set(http.get("/openapi.json").json()["components"]["schemas"])
    assert set(re.findall(r'"#/components/schemas/(.*?)"', text)) <= names


# What dashboards and routers made for vLLM read, with the buckets that they expect.
READ_ELSEWHERE = """
    num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info
    prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total prompt_tokens_total
    generation_tokens_total request_success_total spec_decode_num_drafts_total
    spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
    spec_decode_num_accepted_tokens_per_pos_total time_to_first_token_seconds_bucket
    inter_token_latency_seconds_bucket request_time_per_output_token_seconds_bucket
    e2e_request_latency_seconds_bucket request_queue_time_seconds_sum
    request_inference_time_seconds_bucket request_prefill_time_seconds_sum
    request_decode_time_seconds_sum request_prompt_tokens_bucket request_generation_tokens_bucket
    request_params_n_bucket request_params_max_tokens_bucket request_max_num_generation_tokens_sum
    request_num_preemptions_bucket request_prefill_kv_computed_tokens_bucket
    iteration_tokens_total_bucket num_requests_waiting_by_reason prompt_tokens_by_source_total
    prompt_tokens_cached_total prompt_tokens_cached_by_source_total corrupted_requests_total
    external_prefix_cache_queries_total external_prefix_cache_hits_total mm_cache_queries_total
    mm_cache_hits_total
"""


@pytest.mark.parametrize("name", READ_ELSEWHERE.split())
def test_what_dashboards_of_vllm_read_is_there(http: httpx.Client, name: str) -> None:
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
    rows = re.findall(rf"^vllm:{name}\{{(.*)\}} \S+$", http.get("/metrics").text, re.MULTILINE)
    assert rows
    assert all('engine="0"' in row and 'model_name="fake"' in row for row in rows)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("time_to_first_token_seconds", "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5"),
        ("inter_token_latency_seconds", "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75"),
        ("e2e_request_latency_seconds", "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0"),
        ("request_prompt_tokens", "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 1000.0"),
    ],
)
def test_buckets_are_those_of_vllm(http: httpx.Client, name: str, bounds: str) -> None:
    page = http.get("/metrics").text
    found = re.findall(rf'^vllm:{name}_bucket\{{.*?le="(.*?)"', page, re.MULTILINE)
    assert found[: len(bounds.split())] == bounds.split()
    counts = re.findall(rf"^(?:vllm|millrace):{name}_count\{{.*\}} (\S+)$", page, re.MULTILINE)
    assert len(set(counts)) == 1
