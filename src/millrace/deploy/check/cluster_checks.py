"""What a cluster itself lacks: versions, custom resources, controllers, secrets, names, images."""

from __future__ import annotations

import re
from collections.abc import Iterator

from millrace.deploy.check.cluster import Cluster, Thing
from millrace.deploy.check.conditions import condition, conditions
from millrace.deploy.files.cluster_script import needed
from millrace.deploy.layout import remedies
from millrace.deploy.layout.layout import Layout
from millrace.doctor.finding import Finding

LEAST = (1, 30)  # with hooks that sleep
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
# Custom resource -> the version that is rendered.
VERSIONS = {
    "scaledobjects.keda.sh": "v1alpha1",
    "leaderworkersets.leaderworkerset.x-k8s.io": "v1",
    "inferencepools.inference.networking.k8s.io": "v1",
    "gateways.gateway.networking.k8s.io": "v1",
    "podmonitors.monitoring.coreos.com": "v1",
    "computeclasses.cloud.google.com": "v1",
    "podmonitorings.monitoring.googleapis.com": "v1",
    "volumesnapshots.snapshot.storage.k8s.io": "v1",
}


def version(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    found = cluster.get("/version") or {}
    text = str(found.get("gitVersion", "unknown"))
    numbers = re.match(r"v?(\d+)\.(\d+)", text)
    if numbers and (int(numbers[1]), int(numbers[2])) >= LEAST:
        yield Finding("cluster", "version", text)
        return
    upgrade = {
        "eks": "eksctl upgrade cluster --name NAME --approve",
        "plain": "upgrade the control plane, such as kubeadm upgrade apply v1.30.0",
    }.get(layout.file.platform, "gcloud container clusters upgrade NAME --master")
    yield Finding("cluster", "version", f"{text}; 1.30 or newer is needed", "fail", upgrade)


def custom_resources(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Each that the layout uses, in the version that it uses."""
    for name, command in [*needed(layout), *_of_google(layout)]:
        found = cluster.get(f"{CRDS}/{name}")
        if found is None:
            yield Finding("custom resources", name, "not installed", "fail", command)
            continue
        served = [one["name"] for one in found["spec"]["versions"] if one.get("served")]
        wanted = VERSIONS[name]
        if wanted in served:
            yield Finding("custom resources", name, wanted)
        else:
            value = f"serves {', '.join(served) or 'nothing'}, and {wanted} is used"
            yield Finding("custom resources", name, value, "fail", command)


def _of_google(layout: Layout) -> list[tuple[str, str]]:
    """Custom resources that GKE brings itself, in versions that are new enough."""
    if not layout.file.on_google:
        return []
    update = "gcloud container clusters update NAME "
    found = []
    if layout.file.has_gpus:
        upgrade = "gcloud container clusters upgrade NAME --master"
        found.append(("computeclasses.cloud.google.com", upgrade))
    if layout.file.entry == "inference-pool":
        gateways = "gateways.gateway.networking.k8s.io"
        found.append((gateways, f"{update}--gateway-api standard"))
    if layout.file.monitoring == "google":
        monitors = "podmonitorings.monitoring.googleapis.com"
        found.append((monitors, f"{update}--enable-managed-prometheus"))
    if not layout.ships:
        snapshots = "volumesnapshots.snapshot.storage.k8s.io"
        found.append((snapshots, f"{update}--update-addons GcePersistentDiskCsiDriver=ENABLED"))
    return found


def controllers(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """What acts on custom resources: without it they are stored, and nothing happens."""
    if layout.file.autoscale is not None:
        yield _deployment(cluster, "KEDA", "keda", "keda-operator", remedies.INSTALL_KEDA)
        service = "/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.external.metrics.k8s.io"
        found = cluster.get(service)
        state = condition(conditions(found), "Available") if found else None
        if state is not None and state.status == "True":
            yield Finding("controllers", "external metrics", "served")
        else:
            why = state.words if state else "nobody serves them, so that nothing is scaled"
            yield Finding("controllers", "external metrics", why, "fail", remedies.INSTALL_KEDA)
    if layout.groups:
        yield _deployment(cluster, "LeaderWorkerSet", "lws-system", "lws-controller-manager",
                          remedies.INSTALL_LEADER_WORKER_SET)  # fmt: skip


def _deployment(cluster: Cluster, title: str, space: str, name: str, install: str) -> Finding:
    found = cluster.get(f"/apis/apps/v1/namespaces/{space}/deployments/{name}")
    if found is None:
        return Finding("controllers", title, f"no {name} in {space}", "fail", install)
    if int((found.get("status") or {}).get("availableReplicas") or 0) > 0:
        return Finding("controllers", title, "runs")
    look = f"kubectl describe pods -n {space}"
    return Finding("controllers", title, f"{name} is installed and not available", "fail", look)


def namespace(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """The namespace, and the secrets that pods take keys from."""
    space = layout.file.namespace
    if cluster.get(f"/api/v1/namespaces/{space}") is None:
        yield Finding("namespace", space, "not there", "fail", "kubectl apply -k cluster")
        return
    yield Finding("namespace", space, "there")
    secrets = {
        layout.file.hub_token_secret: ("HF_TOKEN", '"$HF_TOKEN"'),
        layout.file.api_key_secret: ("api-key", '"$(openssl rand -hex 32)"'),
        layout.file.image_pull_secret: (".dockerconfigjson", ""),
    }
    for name, (key, value) in secrets.items():
        if name:
            yield _secret(cluster, space, name, key, value)


def _secret(cluster: Cluster, space: str, name: str, key: str, value: str) -> Finding:
    found = cluster.get(f"/api/v1/namespaces/{space}/secrets/{name}")
    create = f"kubectl create secret generic {name} -n {space} --from-literal={key}={value}"
    if not value:
        create = (
            f"kubectl create secret docker-registry {name} -n {space} --docker-server=SERVER "
            "--docker-username=USER --docker-password=PASSWORD"
        )
    if found is None:
        return Finding("namespace", f"secret {name}", "not there", "fail", create)
    if key not in (found.get("data") or {}):
        again = f"kubectl delete secret {name} -n {space} && {create}"
        return Finding("namespace", f"secret {name}", f"it has no {key}", "fail", again)
    return Finding("namespace", f"secret {name}", f"has {key}")


def names(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Whether anybody answers for names of services: the gateway finds replicas by theirs."""
    path = "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices"
    ready = [
        endpoint
        for one in cluster.items(path)
        if (one["metadata"].get("labels") or {}).get("kubernetes.io/service-name") == "kube-dns"
        for endpoint in one.get("endpoints") or []
        if (endpoint.get("conditions") or {}).get("ready", True)
    ]
    if ready or layout.file.on_google:  # Google's own servers may answer in its place
        yield Finding("cluster", "names", f"{len(ready)} servers of names are ready")
        return
    yield Finding("cluster", "names", "no server of names is ready", "fail",
                  "kubectl rollout restart -n kube-system deployment/coredns")  # fmt: skip


def images(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """What pods of the namespace say of their images; before there are any, the images' names."""
    space = layout.file.namespace
    pods = cluster.items(f"/api/v1/namespaces/{space}/pods")
    for image in dict.fromkeys((layout.image, layout.cpu_image)):
        problem = _pull_problem(pods, image)
        push = f"docker buildx build -t {image} --push PATH/TO/millrace"
        if problem:
            secret = layout.file.image_pull_secret
            advice = push if secret else f"{push}; or name a Secret as image_pull_secret"
            yield Finding("images", image, problem, "fail", advice)
        elif "/" not in image:
            value = "no registry in its name: machines cannot pull it unless they have it"
            advice = f"image: REGISTRY/{image} in deploy.yaml, and docker push REGISTRY/{image}"
            yield Finding("images", image, value, "warn", advice)
        else:
            yield Finding("images", image, "no pod complains")


def _pull_problem(pods: list[Thing], image: str) -> str:
    for pod in pods:
        for one in (pod.get("status") or {}).get("containerStatuses") or []:
            waiting = (one.get("state") or {}).get("waiting") or {}
            if one.get("image") == image and waiting.get("reason") in (
                "ErrImagePull",
                "ImagePullBackOff",
                "InvalidImageName",
            ):
                return f"cannot be pulled: {waiting.get('message') or waiting['reason']}"
    return ""
