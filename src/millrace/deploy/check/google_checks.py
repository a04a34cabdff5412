"""What Google's side of a cluster lacks, by gcloud: quotas, services, subnets, the cluster's
shape.
"""

from __future__ import annotations

from collections.abc import Iterator

from millrace.deploy.check.cluster import gcloud
from millrace.deploy.check.machine_checks import wanted_gpus
from millrace.deploy.files.cluster_script import cluster_name, proxy_subnet_command
from millrace.deploy.layout.clouds import machine_for
from millrace.deploy.layout.layout import Layout
from millrace.doctor.finding import Finding
from millrace.errors import UserError

# Families of GPUs as quotas name them.
FAMILIES = {
    "l4": "NVIDIA_L4", "a100-40": "NVIDIA_A100", "a100-80": "NVIDIA_A100_80GB",
    "h100": "NVIDIA_H100", "h200": "NVIDIA_H200", "b200": "NVIDIA_B200", "gb200": "NVIDIA_GB200",
    "rtx-pro-6000": "NVIDIA_RTX_PRO_6000",
}  # fmt: skip
SERVICES = ("container.googleapis.com", "compute.googleapis.com")
NETWORK_SERVICES = "networkservices.googleapis.com"


def google(layout: Layout) -> Iterator[Finding]:
    """Nothing on other platforms. Without gcloud, or a project, one finding says so."""
    if not layout.file.on_google:
        return
    if not layout.file.google.project:
        yield Finding("Google", "project", "not named: quotas and services are not looked at",
                      "warn", "set google: {project: ...} in deploy.yaml")  # fmt: skip
        return
    for check in (_services, _quota, _shape, _subnet):
        try:
            yield from check(layout)
        except UserError as error:
            yield Finding("Google", check.__name__.strip("_"), str(error), "warn",
                          "gcloud auth login")  # fmt: skip


def _project(layout: Layout) -> tuple[str, str]:
    return "--project", layout.file.google.project


def _services(layout: Layout) -> Iterator[Finding]:
    wanted = [*SERVICES]
    if layout.file.entry == "inference-pool":
        wanted.append(NETWORK_SERVICES)
    found = gcloud("services", "list", "--enabled", *_project(layout)) or []
    enabled = {one.get("config", {}).get("name") for one in found}
    for name in wanted:
        if name in enabled:
            yield Finding("Google", name, "enabled")
        else:
            why = "not enabled"
            if name == NETWORK_SERVICES:
                why += ": a regional Gateway stays unprogrammed, and does not say why"
            command = f"gcloud services enable {name} --project {layout.file.google.project}"
            yield Finding("Google", name, why, "fail", command)


def _quota(layout: Layout) -> Iterator[Finding]:
    """Of the GPU's family in the region; spot machines have one of their own."""
    if not layout.file.has_gpus:
        return
    google, family = layout.file.google, FAMILIES[layout.file.gpu]
    wanted = f"PREEMPTIBLE_{family}_GPUS" if layout.file.price == "spot" else f"{family}_GPUS"
    region = gcloud("compute", "regions", "describe", google.region, *_project(layout)) or {}
    rows = {one["metric"]: one for one in region.get("quotas", [])}
    size = machine_for(layout.file.platform, layout.file.gpu, layout.gpus)[0]
    need = -(-wanted_gpus(layout) // size) * size  # machines are whole
    ask = (
        "gcloud beta quotas preferences create --service compute.googleapis.com "
        "--quota-id GPUS-PER-GPU-FAMILY-per-project-region "
        f"--dimensions gpu_family={family},region={google.region} --preferred-value {need} "
        f"--project {google.project}"
    )
    row = rows.get(wanted)
    if row is None:
        yield Finding("Google", f"quota {wanted}", "not listed for the region", "warn", ask)
        return
    left = int(row["limit"]) - int(row.get("usage", 0))
    value = f"{left} of {int(row['limit'])} left, {need} are wanted"
    if left >= need:
        yield Finding("Google", f"quota {wanted}", value)
    else:
        yield Finding("Google", f"quota {wanted}", value, "fail", ask)


def _shape(layout: Layout) -> Iterator[Finding]:
    """A VPC-native cluster with Google's load balancing, which Gateways need."""
    google, name = layout.file.google, cluster_name(layout)
    found = gcloud("container", "clusters", "describe", name, "--location", google.region,
                   *_project(layout)) or {}  # fmt: skip
    if layout.file.entry != "inference-pool":
        yield Finding("Google", "cluster", name)
        return
    update = f"gcloud container clusters update {name} --location {google.region} "
    if not (found.get("ipAllocationPolicy") or {}).get("useIpAliases"):
        yield Finding("Google", "cluster", "not VPC-native: Gateways do not work", "fail",
                      f"gcloud container clusters create {name}-2 --enable-ip-alias")  # fmt: skip
    balancing = (found.get("addonsConfig") or {}).get("httpLoadBalancing") or {}
    if balancing.get("disabled"):
        yield Finding("Google", "load balancing", "disabled: Gateways do not work", "fail",
                      f"{update}--update-addons HttpLoadBalancing=ENABLED")  # fmt: skip
    channel = ((found.get("networkConfig") or {}).get("gatewayApiConfig") or {}).get("channel")
    if channel in (None, "CHANNEL_DISABLED"):
        yield Finding("Google", "Gateway API", "disabled", "fail",
                      f"{update}--gateway-api standard")  # fmt: skip


def _subnet(layout: Layout) -> Iterator[Finding]:
    """The proxy-only subnet of a regional Gateway."""
    if layout.file.entry != "inference-pool":
        return
    google = layout.file.google
    of_proxies = ("--regions", google.region, "--filter", "purpose=REGIONAL_MANAGED_PROXY")
    found = gcloud("compute", "networks", "subnets", "list", *of_proxies, *_project(layout)) or []
    active = [one for one in found if one.get("role", "ACTIVE") == "ACTIVE"]
    if active:
        yield Finding("Google", "proxy-only subnet", active[0].get("name", "there"))
        return
    command = f"{proxy_subnet_command(google.region)} --project {google.project}"
    yield Finding("Google", "proxy-only subnet",
                  "none in the region: a regional Gateway stays unprogrammed without a word",
                  "fail", command)  # fmt: skip
