"""Commands that bring what a cluster lacks. Scripts, the guide and the check all take them here."""

from __future__ import annotations

KEDA = "2.20.2"
LEADER_WORKER_SET = "0.10.0"
INFERENCE_EXTENSION = "1.6.0"
GATEWAY_API = "1.5.0"
GPU_PLUGIN = "0.17.4"
ROUTER_CHART = "oci://ghcr.io/llm-d/charts/llm-d-router-gateway"
_RELEASES = "https://github.com/{}/releases/download/v{}/{}"


def _apply(repository: str, version: str, file: str) -> str:
    return f"kubectl apply --server-side -f {_RELEASES.format(repository, version, file)}"


INSTALL_KEDA = _apply("kedacore/keda", KEDA, f"keda-{KEDA}.yaml")
INSTALL_LEADER_WORKER_SET = _apply("kubernetes-sigs/lws", LEADER_WORKER_SET, "manifests.yaml")
INSTALL_INFERENCE = _apply(
    "kubernetes-sigs/gateway-api-inference-extension", INFERENCE_EXTENSION, "manifests.yaml"
)
INSTALL_GATEWAY_API = _apply("kubernetes-sigs/gateway-api", GATEWAY_API, "standard-install.yaml")
INSTALL_PROMETHEUS = (
    "helm install prometheus oci://ghcr.io/prometheus-community/charts/kube-prometheus-stack "
    "--namespace monitoring --create-namespace"
)
INSTALL_GPU_PLUGIN = (
    "kubectl apply -f https://raw.githubusercontent.com/NVIDIA/k8s-device-plugin/"
    f"v{GPU_PLUGIN}/deployments/static/nvidia-device-plugin.yml"
)
INSTALL_SNAPSHOTS = (
    "kubectl apply -k https://github.com/kubernetes-csi/external-snapshotter/client/config/crd"
)


def install_router(name: str, namespace: str, version: str) -> str:
    return (
        f"helm upgrade --install {name} {ROUTER_CHART} --version {version} "
        f"--namespace {namespace} --values router/values.yaml"
    )
