"""Each fault of a cluster, planted in one that is otherwise whole: found, and with its remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.cli import run
from millrace.deploy.check.cluster import Cluster
from millrace.deploy.check.run import check_cluster
from millrace.deploy.layout.layout import Layout
from millrace.doctor.finding import Finding
from millrace.errors import UserError
from tests.deploy.fake_cluster import FakeCluster, fake_cluster
from tests.deploy.healthy import false, make_healthy, put_pod, true
from tests.deploy.variants import layout

Plant = Callable[[FakeCluster, Layout], None]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[FakeCluster, str]]:
    with fake_cluster(tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Google:
    """A gcloud on PATH that answers what it is told, and keeps what it was asked."""
    return Google(tmp_path, monkeypatch)


class Google:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder / "gcloud"
        self._folder.mkdir()
        script = self._folder / "gcloud"
        script.write_text(
            '#!/bin/bash\necho "$*" >> "$(dirname "$0")/asked"\n'
            'for word in services subnets regions clusters; do case " $* " in *" $word "*)\n'
            'cat "$(dirname "$0")/$word.json"; exit;; esac; done; exit 1\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{self._folder}:/usr/bin:/bin")
        names = ("container", "compute", "networkservices")
        self.says("services", [{"config": {"name": f"{name}.googleapis.com"}} for name in names])
        self.says("subnets", [{"name": "proxy-only", "role": "ACTIVE"}])
        self.quota(1000)
        self.says("clusters", {
            "ipAllocationPolicy": {"useIpAliases": True},
            "networkConfig": {"gatewayApiConfig": {"channel": "CHANNEL_STANDARD"}},
        })  # fmt: skip

    def says(self, word: str, content: Any) -> None:
        (self._folder / f"{word}.json").write_text(json.dumps(content))

    def quota(self, limit: int) -> None:
        metrics = ("NVIDIA_H100_GPUS", "PREEMPTIBLE_NVIDIA_H200_GPUS", "NVIDIA_B200_GPUS")
        rows = [{"metric": name, "limit": limit, "usage": 8} for name in metrics]
        self.says("regions", {"quotas": rows})

    @property
    def asked(self) -> list[str]:
        return (self._folder / "asked").read_text().splitlines()


def check(made: tuple[FakeCluster, str], name: str, plant: Plant | None = None) -> list[Finding]:
    cluster, config = made
    found = layout(name)
    make_healthy(cluster, found)
    if plant is not None:
        plant(cluster, found)
    real = Cluster(kubeconfig=config)
    try:
        return check_cluster(real, found)
    finally:
        real.close()


NO_REGISTRY = "no registry in its name"
CHECKED = [
    "gateway",
    "scaled",
    "pool-project",
    "pool-scaled",
    "hosts",
    "sglang",
    "autopilot",
    "cpu",
]


@pytest.mark.parametrize("name", CHECKED)
def test_a_whole_cluster_has_no_fault_and_is_only_read(
    name: str, made: tuple[FakeCluster, str]
) -> None:
    bad = [one for one in check(made, name) if one.verdict != "ok"]
    bad = [one for one in bad if NO_REGISTRY not in one.value and one.name != "project"]
    if name in ("scaled", "pool-project"):  # with a project, so that gcloud is asked
        assert bad == []
    assert [one for one in bad if one.verdict == "fail"] == []
    assert made[0].methods() == {"GET"}


def gone(kind: str, name: str, space: str | None = None) -> Plant:
    return lambda cluster, _: cluster.remove(kind, name, space)


def changed(kind: str, name: str, space: str | None = None, **content: Any) -> Plant:
    return lambda cluster, _: cluster.change(kind, name, space, **content)


def added(kind: str, name: str, space: str, **content: Any) -> Plant:
    return lambda cluster, _: cluster.put(kind, name, space, **content)


def answers(path: str, content: Any) -> Plant:
    return lambda cluster, _: cluster.answer(path, content)


def no_gpus(cluster: FakeCluster, _: Layout) -> None:
    for number in range(16):
        labels = {"nvidia.com/gpu.present": "true"} if number < 2 else {}
        cluster.put("Node", f"node-{number}", metadata={"labels": labels}, status={})


def few_gpus(cluster: FakeCluster, _: Layout) -> None:
    for number in range(2, 16):
        cluster.put("Node", f"node-{number}", status={})


def bad_image(cluster: FakeCluster, found: Layout) -> None:
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}
    put_pod(cluster, found, "replica-1", state=waiting)


def old_version(cluster: FakeCluster, _: Layout) -> None:
    cluster.version["gitVersion"] = "v1.28.3"


CRD = "CustomResourceDefinition"
KEDA_CRD = "scaledobjects.keda.sh"
GPU = "nvidia.com/gpu"
QUOTA = {"hard": {f"requests.{GPU}": "2"}}
# variant, fault, topic, name, part of the value, part of the command that mends it
FAULTS: list[tuple[str, Plant, str, str, str, str]] = [
    ("gateway", old_version, "cluster", "version",
     "v1.28.3; 1.30 or newer", "kubeadm upgrade"),
    ("gateway", gone("EndpointSlice", "kube-dns-1", "kube-system"), "cluster", "names",
     "no server of names", "kubectl rollout restart -n kube-system deployment/coredns"),
    ("scaled", gone(CRD, KEDA_CRD), "custom resources", KEDA_CRD, "not installed",
     "keda/releases/download/v2.20.2"),
    ("scaled", changed(CRD, KEDA_CRD, spec={"versions": [{"name": "v2", "served": True}]}),
     "custom resources", KEDA_CRD, "serves v2, and v1alpha1 is used", "keda-2.20.2.yaml"),
    ("hosts", gone(CRD, "leaderworkersets.leaderworkerset.x-k8s.io"), "custom resources",
     "leaderworkersets.leaderworkerset.x-k8s.io", "not installed", "lws/releases"),
    ("pool", gone(CRD, "inferencepools.inference.networking.k8s.io"), "custom resources",
     "inferencepools.inference.networking.k8s.io", "not installed", "v1.6.0/manifests.yaml"),
    ("pool", gone(CRD, "gateways.gateway.networking.k8s.io"), "custom resources",
     "gateways.gateway.networking.k8s.io", "not installed", "--gateway-api standard"),
    ("pool-scaled", gone(CRD, "gateways.gateway.networking.k8s.io"), "custom resources",
     "gateways.gateway.networking.k8s.io", "not installed", "standard-install.yaml"),
    ("gateway", gone(CRD, "podmonitors.monitoring.coreos.com"), "custom resources",
     "podmonitors.monitoring.coreos.com", "not installed", "helm install prometheus"),
    ("scaled", gone(CRD, "podmonitorings.monitoring.googleapis.com"), "custom resources",
     "podmonitorings.monitoring.googleapis.com", "not installed", "--enable-managed-prometheus"),
    ("scaled", gone("Deployment", "keda-operator", "keda"), "controllers", "KEDA",
     "no keda-operator in keda", "kubectl apply --server-side"),
    ("scaled", changed("Deployment", "keda-operator", "keda", status={"availableReplicas": 0}),
     "controllers", "KEDA", "not available", "kubectl describe pods -n keda"),
    ("scaled", gone("APIService", "v1beta1.external.metrics.k8s.io"), "controllers",
     "external metrics", "nobody serves them", "keda-2.20.2.yaml"),
    ("hosts", gone("Deployment", "lws-controller-manager", "lws-system"), "controllers",
     "LeaderWorkerSet", "no lws-controller-manager", "lws/releases"),
    ("gateway", gone("Secret", "keys", "gateway"), "namespace", "secret keys", "not there",
     "kubectl create secret generic keys -n gateway --from-literal=api-key="),
    ("gateway", changed("Secret", "hub", "gateway", data={"HF_TOKEN": None, "x": "eA=="}),
     "namespace", "secret hub", "it has no HF_TOKEN", "kubectl delete secret hub -n gateway &&"),
    ("gateway", gone("Secret", "registry", "gateway"), "namespace", "secret registry",
     "not there", "kubectl create secret docker-registry registry -n gateway"),
    ("gateway", no_gpus, "GPUs", GPU, "2 machines have GPUs that nobody offers",
     "nvidia-device-plugin.yml"),
    ("hosts", few_gpus, "GPUs", GPU, "16 of 32", "eksctl scale nodegroup --cluster NAME --name "
     "gpus --nodes 4 --nodes-max 4"),
    ("gateway", added("ResourceQuota", "small", "gateway", spec=QUOTA), "GPUs", "quota small",
     "2 of 3", "kubectl patch resourcequota small -n gateway --type merge"),
    ("scaled", gone("ComputeClass", "millrace"), "GPUs", "ComputeClass", "pods wait for ever",
     "kubectl apply -k cluster"),
    ("scaled", changed("ComputeClass", "millrace",
                       status={"conditions": [false("Health", "Misconfigured", "no such zone")]}),
     "GPUs", "ComputeClass", "no such zone", "kubectl describe computeclass"),
    ("gateway", gone("StorageClass", "nfs"), "volumes", "claim millrace-cache",
     "no storage class nfs", "cache_volume: {storage_class: NAME}"),
    ("gateway", changed("StorageClass", "nfs", provisioner="ebs.csi.aws.com"), "volumes",
     "claim millrace-model", "disks that one machine writes", "set model_volume"),
    ("scaled", gone("StorageClass", "hyperdisk-ml"), "volumes", "claim millrace-model",
     "no storage class hyperdisk-ml", "kubectl apply -k cluster"),
    ("gateway", changed("PersistentVolumeClaim", "millrace-model", "gateway",
                        spec={"accessModes": ["ReadWriteOnce"]}),
     "volumes", "claim millrace-model", "is ReadWriteOnce, and ReadWriteMany is needed",
     "kubectl delete pvc millrace-model"),
    ("gateway", gone("Job", "millrace-download", "gateway"), "model", "download", "not begun",
     "kubectl apply -k model"),
    ("gateway", changed("Job", "millrace-download", "gateway",
                        status={"conditions": [true("Failed", "BackoffLimitExceeded")]}),
     "model", "download", "failed: BackoffLimitExceeded", "kubectl logs -n gateway"),
    ("scaled", gone("VolumeSnapshot", "millrace-model", "scaled"), "model", "snapshot",
     "replicas have no disk to mount", "kubectl apply -k model/publish"),
    ("gateway", bad_image, "images", "millrace:0.1.0-cuda", "cannot be pulled: no such tag",
     "docker buildx build"),
    ("pool", gone("GatewayClass", "gke-l7-rilb"), "entry", "class gke-l7-rilb", "not there",
     "--gateway-api standard"),
    ("pool", gone("Deployment", "millrace-epp", "pool"), "entry", "endpoint picker",
     "no millrace-epp", "helm upgrade --install millrace oci://ghcr.io/llm-d/charts"),
    ("pool", changed("Deployment", "millrace-epp", "pool", status={"readyReplicas": 0}), "entry",
     "endpoint picker", "not ready", "kubectl describe deployment millrace-epp"),
    ("pool", changed("HTTPRoute", "millrace", "pool", status={"parents": [{"conditions": [
        false("ResolvedRefs", "InvalidKind", "unknown kind")]}]}),
     "entry", "HTTPRoute", "cannot send to this kind", "kubectl describe httproute"),
]  # fmt: skip


@pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[3]}-{fault[4]}"[:50]
)
def test_each_fault_is_found_with_what_mends_it(
    fault: tuple[str, Plant, str, str, str, str], made: tuple[FakeCluster, str]
) -> None:
    name, plant, topic, title, value, advice = fault
    found = [one for one in check(made, name, plant) if one.verdict == "fail"]
    mine = [one for one in found if (one.topic, one.name) == (topic, title)]
    assert mine, found
    assert value in mine[0].value
    assert advice in mine[0].advice


def test_a_missing_namespace_is_made_with_the_cluster_folder(
    made: tuple[FakeCluster, str],
) -> None:
    real = Cluster(kubeconfig=made[1])
    found = [one for one in check_cluster(real, layout("cpu")) if one.topic == "namespace"]
    real.close()
    assert found == [Finding("namespace", "cpu", "not there", "fail", "kubectl apply -k cluster")]


STUCK = [
    ([false("Accepted", "Invalid", "subnet not found"), false("Programmed", "Invalid")],
     "its class's controller finds it invalid (subnet not found)"),
    ([true("Accepted"), false("Programmed", "AddressNotAssigned")],
     "it waits for an address: quota of addresses, or the subnet of proxies; its controller "
     "gives no reason"),
    ([{"type": "Programmed", "status": "Unknown", "reason": "Pending"}],
     "nobody has taken it up yet: is there a controller of this class?"),
    ([], "no controller says a word"),
]  # fmt: skip


@pytest.mark.parametrize(("conditions", "words"), STUCK, ids=["invalid", "address", "new", "none"])
def test_a_stuck_gateway_says_why(
    conditions: list[dict[str, str]], words: str, made: tuple[FakeCluster, str]
) -> None:
    """PROGRAMMED: False without a word is what users meet first."""
    plant = changed("Gateway", "millrace", "pool", status={"conditions": conditions})
    (found,) = [one for one in check(made, "pool", plant) if one.name == "Gateway"]
    assert found.verdict == "fail"
    assert words in found.value
    assert "subnets create proxy-only --purpose REGIONAL_MANAGED_PROXY" in found.advice


def test_a_listener_that_conflicts_is_named(made: tuple[FakeCluster, str]) -> None:
    listener = {"name": "http", "conditions": [true("Conflicted", "ProtocolConflict")]}
    status = {"conditions": [false("Programmed", "ListenersNotValid")], "listeners": [listener]}
    plant = changed("Gateway", "millrace", "pool", status=status)
    (found,) = [one for one in check(made, "pool", plant) if one.name == "Gateway"]
    assert "ProtocolConflict" in found.value


def test_spare_endpoint_pickers_are_told_from_more_of_them(made: tuple[FakeCluster, str]) -> None:
    plant = changed("Deployment", "millrace-epp", "pool", spec={"replicas": 3})
    (found,) = [one for one in check(made, "pool", plant) if one.name == "endpoint picker"]
    assert found.verdict == "warn"
    assert "3 replicas, of which one picks" in found.value


def test_what_may_not_be_read_is_said_once(made: tuple[FakeCluster, str]) -> None:
    plant = answers("/api/v1/nodes", 403)
    found = [one for one in check(made, "gateway", plant) if one.topic == "access"]
    assert found == [Finding("access", "gpus", "these credentials may not read /api/v1/nodes",
                             "warn", "kubectl auth can-i --list")]  # fmt: skip


# --- Google's side -----------------------------------------------------------------------------


def test_gcloud_is_asked_for_the_region_and_project(
    made: tuple[FakeCluster, str], google: Google
) -> None:
    check(made, "scaled")
    assert google.asked == [
        "services list --enabled --project p --format json",
        "compute regions describe us-central1 --project p --format json",
        "container clusters describe millrace --location us-central1 --project p --format json",
    ]


GOOGLE_FAULTS: list[tuple[str, Any, str, str, str]] = [
    ("services", [], "networkservices.googleapis.com", "does not say why",
     "gcloud services enable networkservices.googleapis.com --project p"),
    ("subnets", [], "proxy-only subnet", "without a word", "--range 10.129.0.0/23 --region "
     "us-central1 --project p"),
    ("clusters", {"ipAllocationPolicy": {}, "networkConfig": {"gatewayApiConfig": {
        "channel": "CHANNEL_STANDARD"}}}, "cluster", "not VPC-native", "--enable-ip-alias"),
    ("clusters", {"ipAllocationPolicy": {"useIpAliases": True}}, "Gateway API", "disabled",
     "--gateway-api standard"),
    ("clusters", {"ipAllocationPolicy": {"useIpAliases": True}, "addonsConfig": {
        "httpLoadBalancing": {"disabled": True}}}, "load balancing", "disabled",
     "--update-addons HttpLoadBalancing=ENABLED"),
    ("regions", {"quotas": [{"metric": "NVIDIA_H100_GPUS", "limit": 8, "usage": 6}]},
     "quota NVIDIA_H100_GPUS", "2 of 8 left, 4 are wanted", "--preferred-value 4"),
]  # fmt: skip


@pytest.mark.parametrize("fault", GOOGLE_FAULTS, ids=lambda fault: fault[2])
def test_faults_of_googles_side(
    fault: tuple[str, Any, str, str, str],
    made: tuple[FakeCluster, str],
    google: Google,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    word, content, title, value, advice = fault
    google.says(word, content)
    named = layout("pool-project")
    make_healthy(made[0], named)
    real = Cluster(kubeconfig=made[1])
    found = {one.name: one for one in check_cluster(real, named)}
    real.close()
    assert found[title].verdict == "fail"
    assert value in found[title].value
    assert advice in found[title].advice


def test_without_gcloud_one_line_says_so(
    made: tuple[FakeCluster, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = [one for one in check(made, "scaled") if one.topic == "Google"]
    assert {one.value for one in found} == {"gcloud is not on PATH"}
    assert {one.verdict for one in found} == {"warn"}


# --- the command -------------------------------------------------------------------------------


def test_the_command_ends_with_1_if_something_is_missing(
    made: tuple[FakeCluster, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KUBECONFIG", made[1])
    file, report = tmp_path / "deploy.yaml", tmp_path / "report.json"
    file.write_text("model: millrace-mini\ngpu: cpu\n")
    assert run(["deploy", "check", str(file), "--json", str(report)]) == 1
    assert (
        "FAIL  namespace: millrace: not there; kubectl apply -k cluster" in capsys.readouterr().out
    )
    assert json.loads(report.read_text())["ok"] is False


def test_without_a_cluster_it_says_how_to_choose_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no cluster answers"):
        Cluster()
