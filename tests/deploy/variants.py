"""The deploy files that tests render: every entry, platform, engine and shape of replicas."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from millrace.deploy.bundle import render
from millrace.deploy.layout.deploy_file import DeployFile, read_deploy_file
from millrace.deploy.layout.layout import Layout, layout_of
from millrace.deploy.layout.settings import settle

# Settings that leave the planner nothing to try make it quick; `shape: none` does not ask it.
FIXED = "settings: {max_num_seqs: 64, speculative_config: {num_speculative_tokens: 1}}"
MODEL = "model: Qwen/Qwen3.5-27B-FP8"
FREE = f"{MODEL}\nshape: none"
TP16 = "settings: {tensor_parallel_size: 16, max_num_seqs: 64}"

NO_OBJECTS = {"kustomization.yaml", "placement.yaml", "values.yaml", "fleet.yaml", "compose.yaml"}

VARIANTS = {
    "single": f"{MODEL}\ngpu: h200\nentry: service\n{FIXED}",
    "gateway": f"{FREE}\ngpu: h200\nreplicas: 3\napi_key_secret: keys\nhub_token_secret: hub\n"
    "cache_volume: {storage_class: nfs}\nmonitoring: prometheus\nbench: {}\n"
    "traces: 'http://collector.observe:4318/v1/traces'\n"
    "image_pull_secret: registry\ndownload: {arch: arm64}\nnode_selector: {disk: fast}",
    "scaled": f"{MODEL}\ngpu: h200\nplatform: gke-standard\nprice: spot\nreplicas: 12\n{FIXED}\n"
    "autoscale:\n  max: 12\n  schedules:\n"
    "    - {start: 30 7 * * 1-5, end: 0 19 * * 1-5, pods: 4, timezone: Europe/Berlin}\n"
    "monitoring: google\ngoogle: {project: p, reservation: r1, zones: [us-central1-b]}\nbench: {}",
    "autopilot": f"{FREE}\ngpu: b200\nplatform: gke-autopilot\npods: machine\nreplicas: 16\n"
    "price: flex\nsettings: {max_num_seqs: 128}",
    "pool": f"{FREE}\ngpu: h100\nplatform: gke-standard\nengine: vllm\nreplicas: 4\n"
    "entry: inference-pool\nprice: reserved\n"
    "google: {reservation: r1, reservation_project: q}",
    "pool-project": f"{FREE}\ngpu: h100\nplatform: gke-standard\nreplicas: 4\n"
    "entry: inference-pool\ngoogle: {project: p}",
    "pool-scaled": f"{FREE}\ngpu: h200\nreplicas: 2\nentry: inference-pool\n"
    "autoscale: {min: 1, max: 4, prometheus: 'http://prometheus.monitoring:9090'}\n"
    "monitoring: prometheus",
    "hosts": f"{FREE}\ngpu: b200\nplatform: eks\nhosts: 2\nreplicas: 2\n{TP16}",
    "hosts-vllm": f"{FREE}\ngpu: b200\nengine: vllm\nhosts: 2\n{TP16}\n"
    "autoscale: {min: 0, max: 2}",
    "hosts-sglang": f"{FREE}\ngpu: b200\nengine: sglang\nimage: lmsysorg/sglang:v0.5.9\nhosts: 2\n"
    f"entry: inference-pool\n{TP16}",
    "split": f"{FREE}\ngpu: h200\nplatform: gke-standard\nengine: vllm\nentry: inference-pool\n"
    "split: {prefill: 2, decode: 6}\ngoogle: {reservation: r1}",
    "split-wide": f"{FREE}\ngpu: h200\nplatform: eks\nengine: vllm\nentry: inference-pool\n"
    "split: {prefill: 4, decode: 12}\napi_key_secret: keys",
    "sglang": f"{FREE}\ngpu: l4\nplatform: eks\nengine: sglang\nimage: lmsysorg/sglang:v0.5.9\n"
    "entry: service\nsettings: {tensor_parallel_size: 4}\nprice: spot",
    "vllm-machines": f"{FREE}\ngpu: h100\nplatform: eks\nengine: vllm\npods: machine\n"
    "replicas: 24\nmodel_volume: {size: 100Gi}",
    "cpu": "model: millrace-mini\ngpu: cpu\nreplicas: 2\ncontext: 512\nbench: {}",
    "machine": f"{FREE}\ngpu: h200\nplatform: machine\nreplicas: 4\n"
    "settings: {tensor_parallel_size: 2}\nenvironment: {A: b}",
    "machine-vllm": f"{FREE}\ngpu: h200\nplatform: machine\nengine: vllm\nreplicas: 2",
    "bench-wide": f"{FREE}\ngpu: h100\nplatform: gke-standard\nprice: reserved\nbench: {{}}\n"
    "cache_volume: {}\ngoogle: {reservation: r1}",
    "arm": f"{FREE}\ngpu: gb200\nplatform: gke-standard\nreplicas: 4\ncache_volume: {{}}",
    "gateways": f"{FREE}\ngpu: h200\nreplicas: 2\ngateway: {{pods: 2, hold_timeout: 0}}\n"
    "api_key_secret: keys\nautoscale: {min: 1, max: 3, requests: 40}",
}


def parsed(text: str) -> DeployFile:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deploy.yaml"
        path.write_text(text)
        return read_deploy_file(path)


@functools.cache
def layout(name: str) -> Layout:
    file = parsed(f"{VARIANTS[name]}\nnamespace: {name}")
    return layout_of(file, settle(file))


@functools.cache
def rendered(name: str) -> dict[str, str]:
    return render(layout(name))


def objects_of(files: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """(folder, object) of every Kubernetes object, without patches and Kustomize's own files."""
    found = []
    for path, text in files.items():
        folder, _, name = path.rpartition("/")
        if name.endswith(".yaml") and name not in NO_OBJECTS:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            content = yaml.load_all(text, Loader=loader)
            found += [(folder, one) for one in content if "apiVersion" in one]
    return found


def objects(name: str) -> list[tuple[str, dict[str, Any]]]:
    return objects_of(rendered(name))


def find(name: str, kind: str, ending: str = "") -> dict[str, Any]:
    """The one object of a kind whose name ends so."""
    (found,) = [one for _, one in objects(name)
                if one["kind"] == kind and one["metadata"]["name"].endswith(ending)]  # fmt: skip
    return found
