"""Settings by the planner, numbers of pods, times, commands and costs."""

from __future__ import annotations

import shlex
from typing import Any

import click
import pytest
import yaml

from millrace.cli import cli
from millrace.deploy.layout.layout import layout_of
from millrace.deploy.layout.settings import settle
from millrace.deploy.manifests.placement import ARM_TAINT, placement
from millrace.errors import ConfigError
from tests.deploy.test_render import all_pods, pod_specs
from tests.deploy.variants import (
    FIXED,
    FREE,
    MODEL,
    VARIANTS,
    find,
    layout,
    objects,
    parsed,
    rendered,
)


def settled(text: str) -> Any:
    file = parsed(text)
    return layout_of(file, settle(file))


def test_the_planner_chooses_what_the_file_leaves_open() -> None:
    """The fewest ranks that fit; sequences for the load; a price of the class."""
    found = settled("model: qwen3.5-27b\ngpu: l4\nreplicas: 2\nload: {concurrency: 16}\n"
                    "settings: {speculative_config: {num_speculative_tokens: 1}}")  # fmt: skip
    assert found.settings.ranks == 2
    assert found.settings.options["tensor_parallel_size"] == 2
    assert found.gpus == 2
    assert found.settings.options["max_num_seqs"] in (32, 64)
    assert found.settings.options["max_model_len"] == 4096
    assert found.settings.cost is None, "no price of an L4 is known"


def test_prices_follow_the_class_and_whole_machines() -> None:
    spot = layout("scaled")
    assert spot.settings.price.kind == "spot"  # type: ignore[union-attr]
    assert spot.hourly == pytest.approx(16 * 6.26), "12 pods keep two machines of 8"
    own = settled(f"{MODEL}\ngpu: h200\ndollars: 2.5\n{FIXED}")
    assert own.hourly == 2.5
    assert own.settings.cost.million.value > 0


def test_gpus_in_all_leave_the_number_of_replicas_to_the_planner() -> None:
    found = settled(f"{MODEL}\ngpu: h200\ngpus: 4\nload: {{concurrency: 64}}\n"
                    "settings: {tensor_parallel_size: 2, max_num_seqs: 64, "
                    "speculative_config: {num_speculative_tokens: 1}}")  # fmt: skip
    assert (found.settings.replicas, found.gpus, found.count) == (2, 2, 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single", (1, 1, 1)),
        ("autopilot", (2, 8, 8)),
        ("vllm-machines", (3, 8, 8)),
        ("hosts", (2, 1, 8)),
        ("sglang", (1, 1, 4)),
        ("cpu", (2, 1, 0)),
    ],
)
def test_pods_replicas_in_each_and_gpus(name: str, expected: tuple[int, int, int]) -> None:
    found = layout(name)
    assert (found.count, found.engines, found.gpus) == expected


def test_a_pod_gets_the_time_that_its_server_takes_to_stop() -> None:
    """The hook, the requests that are open, and the engine, before Kubernetes kills it."""
    for name, spec in all_pods():
        for container in spec["containers"]:
            if "lifecycle" not in container:
                continue
            pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            flag = "--drain-timeout" if container["name"] == "gateway" else "--shutdown-timeout"
            words = shlex.split(" ".join(container["command"]).replace("'", ""))
            if flag in words:
                drain = int(words[words.index(flag) + 1])
                assert drain == layout(name).file.drain
                assert pause + drain + 10 <= spec["terminationGracePeriodSeconds"]


def test_probes_allow_an_hour_and_do_not_kill_what_drains() -> None:
    spec = pod_specs(find("single", "Deployment"))[0]["containers"][0]
    start = spec["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] == 3600
    assert spec["readinessProbe"]["httpGet"]["path"] == "/health"
    assert spec["livenessProbe"]["httpGet"]["path"] == "/version"  # /health is 503 while it drains
    assert find("single", "Deployment")["spec"]["progressDeadlineSeconds"] > 3600


def test_a_gateway_that_holds_requests_is_ready_without_replicas() -> None:
    holding = pod_specs(find("scaled", "Deployment", "-gateway"))[0]["containers"][0]
    assert "tcpSocket" in holding["readinessProbe"]
    refusing = pod_specs(find("gateways", "Deployment", "-gateway"))[0]["containers"][0]
    assert refusing["readinessProbe"]["httpGet"]["path"] == "/health"


def test_an_autoscaled_fleet_has_no_number_of_its_own() -> None:
    for name in VARIANTS:
        scaled = layout(name).file.autoscale is not None
        for _, one in objects(name):
            if one["metadata"]["name"] == "millrace-replica" and one["kind"] in (
                "Deployment",
                "LeaderWorkerSet",
            ):
                assert ("replicas" in one["spec"]) != scaled


# --- commands ----------------------------------------------------------------------------------


def parse(words: list[str]) -> None:
    """Read a command line as the program would, and run nothing."""
    command: click.Command = cli
    context, rest = click.Context(cli), words[1:]
    while isinstance(command, click.Group) and rest and rest[0] in command.list_commands(context):
        found = command.get_command(context, rest[0])
        assert found is not None
        command, rest = found, rest[1:]
    command.make_context(words[1], list(rest))


def test_every_command_of_millrace_is_one_that_it_takes() -> None:
    seen = set()
    for _, spec in all_pods():
        for container in spec["containers"]:
            words = container.get("command", [])
            if words[:2] == ["/bin/sh", "-c"] and "millrace.cli" in words[2]:
                line = shlex.split(words[2])
                words = ["millrace", *line[line.index("millrace.cli") + 1 :]]
            if words and words[0] == "millrace" and tuple(words) not in seen:
                seen.add(tuple(words))
                parse(words)
    assert {key[1] for key in seen} == {"serve", "gateway", "download", "bench"}


def test_other_engines_get_their_own_words() -> None:
    sglang = pod_specs(find("sglang", "Deployment"))[0]["containers"][0]["command"]
    assert sglang[:3] == ["python3", "-m", "sglang.launch_server"]
    assert "--tp-size" in sglang
    assert "--context-length" in sglang
    vllm = pod_specs(find("vllm-machines", "Deployment", "-replica"))[0]["containers"][0]["command"]
    assert vllm[:3] == ["vllm", "serve", "/models/Qwen3.5-27B-FP8"]
    assert vllm[vllm.index("--data-parallel-size") + 1] == "8"


def test_ranks_of_a_group_find_each_other() -> None:
    group = find("hosts", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2
    script = pod_specs(group["workerTemplate"])[0]["containers"][0]["command"][2]
    assert script.startswith("exec torchrun --nnodes 2 --nproc-per-node 8 --node-rank")
    assert '"$LWS_WORKER_INDEX"' in script
    assert '--master-addr "$LWS_LEADER_ADDRESS"' in script
    leader = pod_specs(group["leaderTemplate"])[0]["containers"][0]
    worker = pod_specs(group["workerTemplate"])[0]["containers"][0]
    assert "readinessProbe" in leader
    assert "readinessProbe" not in worker, "it serves nothing"
    vllm = find("hosts-vllm", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    assert "--headless" in pod_specs(vllm["workerTemplate"])[0]["containers"][0]["command"][2]


def test_a_split_that_fits_one_machine_shares_it() -> None:
    term = pod_specs(find("split", "Deployment", "-decode"))[0]["affinity"]["podAffinity"]
    (found,) = term["requiredDuringSchedulingIgnoredDuringExecution"]
    assert found["topologyKey"] == "kubernetes.io/hostname"
    wide = pod_specs(find("split-wide", "Deployment", "-decode"))[0]["affinity"]["podAffinity"]
    assert "preferredDuringSchedulingIgnoredDuringExecution" in wide
    decode = pod_specs(find("split", "Deployment", "-decode"))[0]
    assert decode["containers"][0]["ports"][0]["containerPort"] == 8200
    assert decode["initContainers"][0]["ports"][0]["containerPort"] == 8000
    assert find("split", "Deployment", "-prefill")["spec"]["replicas"] == 2
    assert find("split", "Deployment", "-decode")["spec"]["replicas"] == 6


def test_the_free_variants_say_that_nobody_checked_them() -> None:
    assert (
        "nothing says whether these settings fit" in settle(parsed(f"{FREE}\ngpu: h200")).notes[0]
    )


def test_a_benchmark_gets_a_machine_that_it_fits() -> None:
    """Its pod serves all replicas itself, so that it may need a larger one than they have."""
    classes = {one["metadata"]["name"]: one["spec"]["priorities"]
               for _, one in objects("bench-wide") if one["kind"] == "ComputeClass"}  # fmt: skip
    machines = {name: {way["machineType"] for way in ways} for name, ways in classes.items()}
    assert machines == {"millrace": {"a3-highgpu-1g"}, "millrace-bench": {"a3-highgpu-4g"}}
    assert "reservations" in classes["millrace"][0]
    assert not [way for way in classes["millrace-bench"] if "reservations" in way]
    for spec in pod_specs(find("bench-wide", "Job", "-bench")):
        assert spec["nodeSelector"]["cloud.google.com/compute-class"] == "millrace-bench"
    with pytest.raises(ConfigError, match=r"do not fit into a machine of 8; .*replicas: \[1, 2\]"):
        settled(f"{FREE}\ngpu: h100\nsettings: {{tensor_parallel_size: 4}}\nbench: {{}}")


def test_machines_with_arm_processors_are_tolerated() -> None:
    assert ARM_TAINT["value"] == "arm64"
    assert ARM_TAINT in placement(layout("arm"))["tolerations"]
    assert ARM_TAINT not in placement(layout("scaled"))["tolerations"]


def test_caches_of_several_pods_are_on_a_file_system_that_they_share() -> None:
    shared = find("arm", "PersistentVolumeClaim", "-cache")["spec"]
    assert shared["accessModes"] == ["ReadWriteMany"]
    assert shared["storageClassName"] == "standard-rwx"
    assert shared["resources"]["requests"]["storage"] == "1Ti"
    assert "GcpFilestoreCsiDriver" in rendered("arm")["cluster.sh"]
    alone = find("bench-wide", "PersistentVolumeClaim", "-cache")["spec"]
    assert alone["accessModes"] == ["ReadWriteOnce"]
    assert "storageClassName" not in alone
    assert "Filestore" not in rendered("bench-wide")["cluster.sh"]


def test_the_endpoint_picker_fits_its_machine_and_its_metrics_are_read() -> None:
    values = yaml.safe_load(rendered("pool-scaled")["router/values.yaml"])["router"]
    assert float(values["epp"]["resources"]["requests"]["cpu"]) <= 4
    assert values["monitoring"]["prometheus"]["enabled"]
    level = find("pool", "Namespace")["metadata"]["labels"]
    assert level == {"pod-security.kubernetes.io/enforce": "baseline"}, "of the chart's pods"
    with pytest.raises(ConfigError, match="use monitoring: prometheus too"):
        parsed(VARIANTS["pool-scaled"].replace("monitoring: prometheus", ""))
