"""Scripts, images and files of one machine: run against programs that record, and read by what
will read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from millrace.deploy.bundle import render
from millrace.deploy.layout.layout import layout_of
from millrace.deploy.layout.settings import settle
from millrace.fleet.fleet_file import read_fleet_file
from tests.deploy.test_layout import parse
from tests.deploy.variants import VARIANTS, layout, parsed, rendered

PROGRAMS = ("aws", "gcloud", "kubectl", "eksctl", "helm")
RECORDER = """#!/bin/bash
echo "$(basename "$0") $*" >> "$RECORD"
case "$*" in
*LifeCycleState*) echo available ;;
*create-file-system*) echo fs-1 ;;
*subnetIds*) echo subnet-a subnet-b ;;
*clusterSecurityGroupId*) echo sg-1 ;;
esac
for word in $MISSING; do [[ " $* " == *" $word "* ]] && exit 1; done
exit 0
"""


def recorded(
    name: str, folder: Path, missing: str = "describe get", **environment: str
) -> list[str]:
    """The commands that a variant's cluster script runs. missing: words of commands that fail."""
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    for program in PROGRAMS:
        (bin / program).write_text(RECORDER)
        (bin / program).chmod(0o755)
    script = folder / "cluster.sh"
    script.write_text(rendered(name)["cluster.sh"])
    (folder / "record").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(script)],
        env={
            "PATH": f"{bin}:/usr/bin:/bin",
            "RECORD": str(folder / "record"),
            "MISSING": missing,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "record").read_text().splitlines()


def test_the_script_of_a_pool_on_gke(tmp_path: Path) -> None:
    """What a regional Gateway needs comes before the cluster: without it, it stays unprogrammed
    and says nothing."""
    with pytest.raises(AssertionError, match=r"google\.project in deploy\.yaml"):
        recorded("pool", tmp_path)
    found = recorded("pool", tmp_path, PROJECT="p")
    where = "--location us-central1 --project p"
    subnet = "gcloud compute networks subnets"
    assert found == [
        "gcloud services enable container.googleapis.com compute.googleapis.com "
        "networkservices.googleapis.com --project p",
        f"{subnet} describe proxy-only --region us-central1 --project p",
        f"{subnet} create proxy-only --purpose REGIONAL_MANAGED_PROXY --role ACTIVE "
        "--network default --range 10.129.0.0/23 --region us-central1 --project p",
        f"gcloud container clusters describe millrace {where}",
        "gcloud container clusters create millrace --release-channel regular --num-nodes 1 "
        "--machine-type c3-standard-8 --enable-ip-alias --enable-dataplane-v2 "
        "--addons HttpLoadBalancing,GcePersistentDiskCsiDriver --gateway-api standard " + where,
        f"gcloud container clusters get-credentials millrace {where}",
        "kubectl get crd inferencepools.inference.networking.k8s.io",
        "kubectl apply --server-side -f https://github.com/kubernetes-sigs/"
        "gateway-api-inference-extension/releases/download/v1.6.0/manifests.yaml",
    ]


def test_a_second_run_makes_nothing_again(tmp_path: Path) -> None:
    """Whatever is there already is only looked at."""
    found = recorded("scaled", tmp_path, missing="")
    assert not [line for line in found if " create" in line or " apply" in line]
    first = recorded("scaled", tmp_path)
    assert any("clusters create" in line and "--enable-managed-prometheus" in line
               for line in first)  # fmt: skip
    assert any(line.startswith("kubectl apply") and "keda-2.20.2.yaml" in line for line in first)


def test_autopilot_and_eks_have_their_own_commands(tmp_path: Path) -> None:
    auto = rendered("autopilot")["cluster.sh"]
    assert 'clusters create-auto "$CLUSTER"' in auto
    found = recorded("hosts", tmp_path)
    assert not [line for line in found if line.startswith("gcloud")]
    assert any("--node-type p6-b200.48xlarge --nodes-min 0 --nodes 4" in line for line in found)
    assert any("lws/releases/download/v0.10.0" in line for line in found)
    shared = "aws efs create-mount-target --region us-east-1 --file-system-id fs-1 --subnet-id"
    assert [line for line in found if line.startswith("aws efs create")] == [
        "aws efs create-file-system --region us-east-1 --creation-token millrace --encrypted "
        "--query FileSystemId --output text",
        f"{shared} subnet-a --security-groups sg-1",
        f"{shared} subnet-b --security-groups sg-1",
    ]
    assert "kubectl apply -f -" in found, "the storage class of the file system"
    assert any("nvidia-device-plugin.yml" in line for line in found)


def test_scripts_are_bash() -> None:
    shellcheck = shutil.which("shellcheck")
    for name in VARIANTS:
        if "cluster.sh" in rendered(name):
            script = rendered(name)["cluster.sh"]
            subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)
            if shellcheck:
                subprocess.run([shellcheck, "-"], input=script, text=True, check=True, timeout=60)


# --- images and machines -----------------------------------------------------------------------


def test_images_run_as_the_user_of_the_pods() -> None:
    files = rendered("single")
    assert {"images/Dockerfile.cpu", "images/Dockerfile.cuda"} <= set(files)
    assert "images/Dockerfile.cuda" not in rendered("pool"), "vLLM has an image of its own"
    for name in ("images/Dockerfile.cpu", "images/Dockerfile.cuda"):
        lines = [line.split() for line in files[name].splitlines() if line[:1].isupper()]
        assert [words[0] for words in lines if words[0] == "FROM"] == ["FROM", "FROM"]
        assert [words[1] for words in lines if words[0] == "USER"] == ["10001"]
        assert {words[0] for words in lines} <= {
            "FROM", "RUN", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD",
        }  # fmt: skip
        assert "amd64,linux/arm64" in files[name]
        assert ":latest" not in files[name]


def test_images_install_what_the_project_pins() -> None:
    root = Path(__file__).parents[2]
    pinned = re.search(r"torch==([\d.]+)", (root / "Makefile").read_text())
    assert pinned
    files = rendered("single")
    assert f"torch=={pinned[1]}" in files["images/Dockerfile.cpu"]
    project = (root / "pyproject.toml").read_text()
    for package in ("apache-tvm-ffi==", "sgl-deep-gemm=="):
        version = re.search(rf'"({package}[\d.]+)"', project)
        assert version
        assert version[1] in files["images/Dockerfile.cuda"]


@pytest.mark.parametrize("name", ["machine", "machine-vllm"])
def test_fleet_files_of_a_machine_are_read_by_the_fleet(name: str, tmp_path: Path) -> None:
    for folder, host in (("compose", "0.0.0.0"), ("systemd", "127.0.0.1")):
        if f"{folder}/fleet.yaml" not in rendered(name):
            assert (name, folder) == ("machine-vllm", "compose"), "its image has no Millrace"
            continue
        path = tmp_path / f"{folder}.yaml"
        path.write_text(rendered(name)[f"{folder}/fleet.yaml"])
        found = read_fleet_file(path)
        assert found.host == host
        assert found.replicas == layout(name).settings.replicas
        assert found.gpus_per_replica == layout(name).settings.ranks
        assert found.drain_timeout == 60
    if name == "machine":
        assert found.model == "/models/Qwen3.5-27B-FP8"
        assert found.environment == {"A": "b"}
    else:
        assert found.command[:3] == ["vllm", "serve", "/models/Qwen3.5-27B-FP8"]


def test_compose_starts_the_fleet_when_the_model_is_there() -> None:
    content = yaml.safe_load(rendered("machine")["compose/compose.yaml"])
    fleet, download = content["services"]["fleet"], content["services"]["download"]
    assert fleet["depends_on"] == {"download": {"condition": "service_completed_successfully"}}
    assert "model:/models:ro" in fleet["volumes"]
    assert "model:/models" in download["volumes"]
    (device,) = fleet["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == 8
    for service in (fleet, download):
        assert service["user"] == "10001:10001"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    volumes = {mount.split(":")[0] for one in (fleet, download) for mount in one["volumes"]}
    assert {name for name in volumes if not name.startswith(".")} == set(content["volumes"])


def test_another_engine_runs_in_its_own_image_behind_a_gateway() -> None:
    """Each replica on GPUs of its own; the gateway in an image that has Millrace."""
    services = yaml.safe_load(rendered("machine-vllm")["compose/compose.yaml"])["services"]
    replicas = [one for name, one in services.items() if name.startswith("replica-")]
    devices = [one["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
               for one in replicas]  # fmt: skip
    assert devices == [["0"], ["1"]]
    for one in replicas:
        assert one["image"].startswith("vllm/")
        assert one["entrypoint"][:2] == ["vllm", "serve"]
        assert one["environment"]["HF_HUB_OFFLINE"] == "1"
    gateway = services["gateway"]
    assert gateway["image"] == layout("machine-vllm").cpu_image
    parse(gateway["entrypoint"])
    assert "http://replica-2:8000" in " ".join(gateway["entrypoint"])
    assert {name for name, one in services.items() if "ports" in one} == {"gateway"}
    # The caches' volume gets the owner that it has in an image of ours.
    assert any(mount.startswith("cache:") for mount in services["download"]["volumes"])


def test_the_unit_waits_for_requests_to_end() -> None:
    unit = rendered("machine")["systemd/millrace.service"]
    assert (
        "ExecStart=/opt/millrace/bin/python -m millrace fleet up /etc/millrace/fleet.yaml" in unit
    )
    assert "User=millrace" in unit
    wait = re.search(r"TimeoutStopSec=(\d+)", unit)
    assert wait
    assert int(wait[1]) > 60 + 10


def test_the_guide_names_each_step_with_its_price() -> None:
    text = rendered("scaled")["README.md"]
    assert text.index("cluster.sh") < text.index("apply -k cluster") < text.index("apply -k model")
    assert text.index("apply -k model`") < text.index("apply -k model/publish")
    assert "tokens/s in all" in text
    assert "from now on $0.00 an hour with 0 pods, $100.16 with 12" in text  # 16 x 6.26
    assert "16 GPUs are paid for and 12 are used: machines have 8" in text
    assert "for a million tokens while full" in text
    assert "docker compose" in rendered("machine")["README.md"]


def test_the_page_takes_a_newcomer_by_a_file_that_renders() -> None:
    """Its first example is rendered, and the prices of its steps are those of the guide."""
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    example = re.search(r"```yaml\n(# deploy.yaml\n.*?)```", page, re.DOTALL)
    assert example
    file = parsed(example[1])
    text = render(layout_of(file, settle(file)))["README.md"]
    walk = page[page.index("## From nothing") : page.index("FAIL ")]
    for command in re.findall(r"^\| `((?:kubectl|millrace|\./)[^`.]*)", walk, re.MULTILINE):
        assert f"`{command}" in text, command
    prices = re.findall(r"\$\d[\d.,]*\d", walk)
    assert len(prices) > 3
    assert [price for price in prices if price not in text] == []
