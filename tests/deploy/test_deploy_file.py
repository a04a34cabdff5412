"""deploy.yaml: what cannot work is refused in one line that names the key and what would work."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.cli import run
from millrace.deploy.layout.layout import layout_of
from millrace.deploy.layout.settings import settle
from millrace.errors import ConfigError
from tests.deploy.variants import parsed

BASE = "model: millrace-mini\ngpu: cpu\n"
GPU = "model: Qwen/Qwen3.5-27B-FP8\ngpu: h200\nshape: none\n"
SCHEDULE = "autoscale: {{max: 4, schedules: [{{start: '{}', end: '{}', pods: {}, timezone: {}}}]}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\n", "missing required field `gpu`"),
        (BASE + "replica: 2", "there is no key replica; there are model, gpu, name"),
        (BASE + "gateway: {pod: 2}", "no key pod in gateway; there are pods, processes"),
        (BASE + "autoscale: {max: 2, schedules: [{begin: x}]}", "begin"),
        (BASE + "name: Über", "name: 'Über'; use up to 40 lower-case letters"),
        (BASE + "replicas: two", "Expected `int`, got `str`"),
        (BASE + "replicas: -1", "replicas: -1; use 0 or more"),
        (BASE + "replicas: 1\ngpus: 2", "replicas and gpus: give one"),
        (BASE + "gateway: {pods: 0}", "gateway: use 1 pod or more"),
        (
            BASE + "model_volume: {size: 10GB}",
            "model_volume.size: '10GB'; use a size such as 100Gi",
        ),
        (BASE + "resources: {gpu: '1'}", "resources: gpu; use cpu and memory"),
        (BASE + "engine: vllm", "gpu: cpu and engine: vllm; use engine: millrace"),
        (BASE + "hosts: 2", "use hosts: 1"),
        (BASE + "monitoring: google", "monitoring: google on plain; use prometheus"),
        (BASE + "autoscale: {max: 0}", "use 0 <= min <= max"),
        (BASE + "entry: service\nautoscale: {max: 2}", "a plain Service counts no requests"),
        (GPU + "engine: sglang", "image: name SGLang's"),
        (GPU + "hosts: 2\npods: machine", "a replica that spans hosts has pods of its own"),
        (GPU + "split: {prefill: 2, decode: 6}", "split: replicas of millrace do not hand"),
        (GPU + "engine: vllm\nsplit: {prefill: 2, decode: 6}", "use entry: inference-pool"),
        (
            GPU + "engine: vllm\nentry: inference-pool\nplatform: gke-autopilot\n"
            "split: {prefill: 2, decode: 6}",
            "Autopilot gives every GPU pod whole machines.*use platform: gke-standard",
        ),
        (
            GPU + "entry: inference-pool\nautoscale: {max: 2}",
            "autoscale.prometheus: with entry: inference-pool its address is needed",
        ),
        (
            GPU + "monitoring: prometheus\nentry: inference-pool\n"
            "autoscale: {max: 2, prometheus: 'http://p'}",
            "autoscale.min: 0 with entry: inference-pool: nothing there holds a request",
        ),
        (
            GPU + SCHEDULE.format("30 7 * *", "0 19 * * *", 2, "UTC"),
            r"schedules.start: '30 7 \* \*'; use minute, hour, day, month and weekday",
        ),
        (GPU + SCHEDULE.format("0 7 * * *", "0  7 * * *", 2, "UTC"), "use a later end"),
        (
            GPU + SCHEDULE.format("0 7 * * *", "0 19 * * *", 2, "Berlin"),
            "timezone: 'Berlin'; use a name such as Europe/Berlin",
        ),
        (
            GPU + SCHEDULE.format("0 7 * * *", "0 19 * * *", 5, "UTC"),
            "schedules.pods: 5; use 1 to 4",
        ),
        (BASE + "traces: collector:4317", "traces: 'collector:4317'; use a URL of OTLP over HTTP"),
        (BASE + "traces: 'http://a b'", "traces: "),
        (GPU + "engine: vllm\nbench: {}", "bench: its Job serves Millrace itself"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "settings: {max_seqs: 2}", "settings: no option max_seqs; they have the names of"),
        (BASE + "settings: {max_num_seqs: many}", "settings: Expected `int"),
        (BASE + "settings: {max_model_len: 9}", "give it as context"),
        ("model: my/model\ngpu: h200", "unknown model 'my/model'.*or shape: none to plan nothing"),
        (
            "model: Qwen/Qwen3.5-27B-FP8\ngpu: l4\nsettings: {tensor_parallel_size: 1}",
            "the planner: .*--tensor-parallel-size 2 does",
        ),
        (GPU + "load: {input: 0}\nshape: qwen3.5-27b", "load: input 0 and output 256"),
        (GPU.replace("h200", "gb10") + "platform: eks", "gpu: eks has no gb10; it has l4, l40s"),
        (GPU + "platform: gke-autopilot", "a3-ultragpu-8g with 8 GPUs for a pod that uses 1; use"),
        (GPU + "hosts: 3\nsettings: {tensor_parallel_size: 8}", "8 ranks do not divide over 3"),
        (
            GPU + "platform: eks\npods: machine\nreplicas: 12",
            "12 do not fill machines of 8; 8 do",
        ),
        (
            GPU + "platform: eks\nsettings: {tensor_parallel_size: 16}",
            "no machine of eks has 16 h200; the largest has 8: use fewer ranks, or hosts: 2",
        ),
    ],
)
def test_refusals_of_settings_and_machines(text: str, message: str) -> None:
    file = parsed(text)
    with pytest.raises(ConfigError, match=message):
        layout_of(file, settle(file))


def test_the_command_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text(BASE + "replica: 2")
    assert run(["deploy", "render", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"millrace deploy: {file}: there is no key replica")
