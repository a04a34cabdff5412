"""Every combination of platform, engine, entry, shape and scaling: refused in words, or valid."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import yaml

from millrace.deploy.bundle import render, write
from millrace.deploy.layout.layout import layout_of
from millrace.deploy.layout.settings import settle
from millrace.errors import ConfigError
from tests.deploy.kustomize import build
from tests.deploy.schemas import CUSTOM, check_core, check_custom
from tests.deploy.variants import objects_of, parsed

PLATFORMS = ("plain", "eks", "gke-standard", "gke-autopilot", "machine")
ENGINES = ("millrace", "vllm", "sglang\nimage: lmsysorg/sglang:v0.5.9")
ENTRIES = ("gateway", "service", "inference-pool")
SHAPES = {
    "one": "replicas: 1",
    "replicas": "replicas: 8",
    "machines": "replicas: 8\npods: machine",
    "hosts": "hosts: 2\nsettings: {tensor_parallel_size: 16}",
    "split": "split: {prefill: 2, decode: 6}",
}
SCALING = (
    "",
    "autoscale: {min: 1, max: 4, prometheus: 'http://prometheus.monitoring:9090'}",
    "autoscale: {min: 0, max: 4}",
    "autoscale: {min: 1, max: 4, schedules: [{start: 30 7 * * 1-5, end: 0 19 * * 1-5, pods: 2}]}",
)
MORE = {
    "plain": "monitoring: prometheus\ncache_volume: {storage_class: nfs}\ndownload: {arch: arm64}",
    "eks": "monitoring: prometheus\ncache_volume: {}\napi_key_secret: keys\nprice: spot",
    "gke-standard": "monitoring: google\ngoogle: {reservation: r1}\nprice: reserved\n"
    "download: {arch: arm64}\ncache_volume: {}\napi_key_secret: keys",
    "gke-autopilot": "monitoring: google\nprice: flex\ndownload: {arch: arm64}",
    "machine": "",
}


@pytest.mark.sweep
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_combination_is_refused_in_words_or_valid(platform: str, tmp_path: Path) -> None:
    seen: set[str] = set()
    refused: list[str] = []
    folders: list[str] = []
    for number, (engine, entry, shape, scaling) in enumerate(
        product(ENGINES, ENTRIES, SHAPES.values(), SCALING)
    ):
        text = (
            f"model: Qwen/Qwen3.5-27B-FP8\nshape: none\ngpu: h100\nplatform: {platform}\n"
            f"engine: {engine}\nentry: {entry}\n{shape}\n{scaling}\n{MORE[platform]}\n"
            f"namespace: n{number}\n"
        )
        try:
            file = parsed(text)
            files = render(layout_of(file, settle(file)))
        except ConfigError as error:
            refused.append(str(error))
            continue
        seen |= {json.dumps(one, sort_keys=True).replace(f'"n{number}"', '"n"')
                 for _, one in objects_of(files)}  # fmt: skip
        write(files, tmp_path / str(number))
        folders += [f"{number}/{path.rpartition('/')[0]}" for path in files
                    if path.endswith("kustomization.yaml")
                    and not path.startswith(("base", "cluster"))]  # fmt: skip
    assert len(refused) > 10
    assert seen or platform == "machine"
    assert [text for text in refused if "\n" in text or "; " not in text] == [], "in one line each"
    for thing in map(json.loads, seen):
        if thing["kind"] not in CUSTOM:
            check_core(thing)
        elif thing["kind"] != "ComputeClass":  # whose definition only GKE has
            check_custom(thing)
    if folders:
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": folders}))
        assert build(tmp_path)
