"""A script that makes a cluster, and what of others it needs; each step is skipped where its
result is there already.
"""

from __future__ import annotations

import shlex
from typing import Any

from millrace.deploy.layout import remedies
from millrace.deploy.layout.clouds import machine_for
from millrace.deploy.layout.layout import Layout
from millrace.deploy.layout.yaml_text import yaml_text
from millrace.deploy.manifests.model_volume import SHARED_CLASSES
from millrace.deploy.manifests.parts import USER

BASE_MACHINE = "c3-standard-8"  # smaller families cannot attach the disk of the model
SHARED_CLASS = SHARED_CLASSES["eks"]
PROXY_RANGE = "10.129.0.0/23"
_HEAD = """\
#!/usr/bin/env bash
# Made by `millrace deploy render`. Each step is skipped where its result is there already.
set -euo pipefail
have() { "$@" > /dev/null 2>&1; }
"""


def cluster_script(layout: Layout) -> str:
    """For bash. On a plain cluster it only adds what is missing."""
    platform = layout.file.platform
    if layout.file.on_google:
        steps = _google(layout)
    elif platform == "eks":
        steps = _amazon(layout)
    else:
        steps = []
    steps += [_unless_crd(name, command) for name, command in needed(layout)]
    if platform in ("plain", "eks") and layout.file.has_gpus:
        found = "kubectl get daemonset -n kube-system nvidia-device-plugin-daemonset"
        steps.append(f"have {found} || {remedies.INSTALL_GPU_PLUGIN}")
    return "\n".join([_HEAD, *steps, ""])


def needed(layout: Layout) -> list[tuple[str, str]]:
    """(a custom resource that must be known, the command that brings it)."""
    file, found = layout.file, []
    if file.autoscale is not None:
        found.append(("scaledobjects.keda.sh", remedies.INSTALL_KEDA))
    if layout.groups:
        kind = "leaderworkersets.leaderworkerset.x-k8s.io"
        found.append((kind, remedies.INSTALL_LEADER_WORKER_SET))
    if file.entry == "inference-pool":
        if not file.on_google:
            found.append(("gateways.gateway.networking.k8s.io", remedies.INSTALL_GATEWAY_API))
        kind = "inferencepools.inference.networking.k8s.io"
        found.append((kind, remedies.INSTALL_INFERENCE))
    if file.monitoring == "prometheus":
        found.append(("podmonitors.monitoring.coreos.com", remedies.INSTALL_PROMETHEUS))
    return found


def _unless_crd(name: str, command: str) -> str:
    return f"have kubectl get crd {name} || {command}"


# --- Google ------------------------------------------------------------------------------------


def cluster_name(layout: Layout) -> str:
    return layout.file.google.cluster or layout.name


def _google(layout: Layout) -> list[str]:
    google = layout.file.google
    where = '--location "$REGION" --project "$PROJECT"'
    services = ["container.googleapis.com", "compute.googleapis.com"]
    if layout.file.entry == "inference-pool":
        services.append("networkservices.googleapis.com")
    steps = [
        f"PROJECT=${{PROJECT:-{shlex.quote(google.project) if google.project else ''}}}",
        f"REGION=${{REGION:-{google.region}}}",
        f"CLUSTER=${{CLUSTER:-{cluster_name(layout)}}}",
        ': "${PROJECT:?set it, or google.project in deploy.yaml}"',
        "",
        f'gcloud services enable {" ".join(services)} --project "$PROJECT"',
    ]
    if layout.file.entry == "inference-pool":
        steps.append(_proxy_subnet())
    described = f'gcloud container clusters describe "$CLUSTER" {where}'
    steps.append(f"have {described} || {_create_google(layout)} {where}")
    if layout.file.platform == "gke-standard" and layout.file.download.arch == "arm64":
        steps.append(
            f'have gcloud container node-pools describe download --cluster "$CLUSTER" {where} || '
            'gcloud container node-pools create download --cluster "$CLUSTER" '
            "--machine-type c4a-standard-4 --num-nodes 0 --enable-autoscaling --min-nodes 0 "
            f"--max-nodes 1 {where}"
        )
    steps.append(f'gcloud container clusters get-credentials "$CLUSTER" {where}')
    return steps


def _create_google(layout: Layout) -> str:
    pool = layout.file.entry == "inference-pool"
    if layout.file.platform == "gke-autopilot":
        return 'gcloud container clusters create-auto "$CLUSTER" --release-channel regular'
    addons = ["HttpLoadBalancing", "GcePersistentDiskCsiDriver"]
    if layout.file.cache_volume is not None and not layout.cache_alone:
        addons.append("GcpFilestoreCsiDriver")
    words = [
        *('gcloud container clusters create "$CLUSTER" --release-channel regular', "--num-nodes 1"),
        *(f"--machine-type {BASE_MACHINE}", "--enable-ip-alias", "--enable-dataplane-v2"),
        f"--addons {','.join(addons)}",
    ]
    if pool:
        words.append("--gateway-api standard")
    if layout.file.google.zones:
        words.append(f"--node-locations {','.join(layout.file.google.zones)}")
    if layout.file.monitoring == "google":
        words.append("--enable-managed-prometheus")
    return " ".join(words)


def proxy_subnet_command(region: str) -> str:
    """A regional Gateway's proxies have their addresses there; without it, it is never
    programmed."""
    return (
        "gcloud compute networks subnets create proxy-only --purpose REGIONAL_MANAGED_PROXY "
        f"--role ACTIVE --network default --range {PROXY_RANGE} --region {region}"
    )


def _proxy_subnet() -> str:
    where = '--region "$REGION" --project "$PROJECT"'
    described = f"gcloud compute networks subnets describe proxy-only {where}"
    create = proxy_subnet_command('"$REGION"')
    return f'have {described} || {create} --project "$PROJECT"'


# --- Amazon ------------------------------------------------------------------------------------


def _amazon(layout: Layout) -> list[str]:
    steps = [
        "AWS_REGION=${AWS_REGION:-us-east-1}",
        f"CLUSTER=${{CLUSTER:-{layout.name}}}",
        "",
        'have eksctl get cluster --name "$CLUSTER" --region "$AWS_REGION" || '
        'eksctl create cluster --name "$CLUSTER" --region "$AWS_REGION" '
        "--nodegroup-name base --node-type m7i.2xlarge --nodes 1",
        # Several pods read the model's volume: a shared file system. Its driver makes folders in it
        # by a role that pods get from the agent.
        *(
            f'have eksctl get addon --cluster "$CLUSTER" --region "$AWS_REGION" --name {name} || '
            f'eksctl create addon --cluster "$CLUSTER" --region "$AWS_REGION" --name {name}{role}'
            for name, role in (
                ("eks-pod-identity-agent", ""),
                ("aws-efs-csi-driver", " --auto-apply-pod-identity-associations"),
            )
        ),
    ]
    if layout.file.has_gpus:
        machine = machine_for("eks", layout.file.gpu, layout.gpus)[1]
        most = layout.file.autoscale.max if layout.file.autoscale else layout.count
        nodes = most * layout.file.hosts
        create = _node_group(layout, "gpus", machine, nodes)
        steps.append(
            f'have eksctl get nodegroup --cluster "$CLUSTER" --region "$AWS_REGION" --name gpus || '
            f'{create} --cluster "$CLUSTER" --region "$AWS_REGION"'
        )
    if not layout.ships or layout.file.cache_volume is not None:
        steps += _shared_files()
    return steps


def _node_group(layout: Layout, name: str, machine: str, nodes: int) -> str:
    spot = " --spot" if layout.file.price == "spot" else ""
    return (
        f"eksctl create nodegroup --name {name} --node-type {machine} --nodes-min 0 "
        f"--nodes {nodes} --nodes-max {nodes}{spot}"
    )


def bench_group_command(layout: Layout) -> str:
    """What brings the benchmark's machine where it is not one of the replicas'; else empty."""
    gpus = layout.bench_gpus if layout.file.has_gpus else 0
    same = layout.machine_gpus(gpus) == layout.machine_gpus(layout.gpus)
    if layout.file.platform != "eks" or not gpus or same:
        return ""
    machine = machine_for("eks", layout.file.gpu, gpus)[1]
    return f"{_node_group(layout, 'bench', machine, 1)} --cluster {layout.name}"


def _shared_files() -> list[str]:
    """A file system that many pods mount, and the storage class of it. A mount target that is
    there already, or another one in its zone, is an error that means no harm."""
    find = 'aws efs describe-file-systems --region "$AWS_REGION" --creation-token "$CLUSTER"'
    vpc = 'aws eks describe-cluster --region "$AWS_REGION" --name "$CLUSTER" --output text --query'
    return [
        "",
        f'FILES=$({find} --query "FileSystems[0].FileSystemId" --output text)',
        'if [ "$FILES" = None ] || [ -z "$FILES" ]; then',
        '  FILES=$(aws efs create-file-system --region "$AWS_REGION" --creation-token "$CLUSTER" '
        "--encrypted --query FileSystemId --output text)",
        "fi",
        'ready() { [ "$(aws efs describe-file-systems --region "$AWS_REGION" --file-system-id '
        '"$FILES" --query "FileSystems[0].LifeCycleState" --output text)" = available ]; }',
        "for _ in $(seq 60); do ready && break; sleep 5; done",
        'ready || { echo "$FILES is not available after 5 minutes; run this again" >&2; exit 1; }',
        f"GROUP=$({vpc} cluster.resourcesVpcConfig.clusterSecurityGroupId)",
        f"for SUBNET in $({vpc} cluster.resourcesVpcConfig.subnetIds); do",
        '  have aws efs create-mount-target --region "$AWS_REGION" --file-system-id "$FILES" '
        '--subnet-id "$SUBNET" --security-groups "$GROUP" || true',
        "done",
        f"have kubectl get storageclass {SHARED_CLASS} || kubectl apply -f - << END",
        yaml_text(_storage_class()).rstrip(),
        "END",
    ]


def _storage_class() -> dict[str, Any]:
    """Every claim is a folder of its own, which belongs to the user of the images."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": SHARED_CLASS},
        "provisioner": "efs.csi.aws.com",
        "parameters": {
            "provisioningMode": "efs-ap", "fileSystemId": "$FILES", "directoryPerms": "700",
            "uid": str(USER), "gid": str(USER),
        },
    }  # fmt: skip
