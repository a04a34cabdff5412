"""The README of a rendered folder: what to run in which order, and what each step costs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from millrace.deploy.files.cluster_script import bench_group_command
from millrace.deploy.files.images import build_commands
from millrace.deploy.layout.layout import Layout
from millrace.deploy.layout.remedies import install_router
from millrace.deploy.manifests.model_volume import by_snapshot
from millrace.plan.predict.flags import as_flags

DOWNLOAD_RATE = 200e6  # bytes a second that a download is reckoned with
CHEAP_MACHINE = 0.2  # dollars an hour of a machine without GPUs


def guide(layout: Layout, files: Sequence[str]) -> str:
    """Markdown. files: paths of what is rendered."""
    file = layout.file
    lines = [
        f"# {file.model} on {file.platform}",
        "",
        _summary(layout),
        "",
        *_prediction(layout),
        "## Steps",
        "",
        *(f"{number}. {step}" for number, step in enumerate(_steps(layout, files), 1)),
        "",
    ]
    return "\n".join(lines)


def _summary(layout: Layout) -> str:
    file, settings = layout.file, layout.settings
    each = f"{layout.gpus} x {file.gpu}" if file.has_gpus else "no GPU"
    what = "groups of pods" if layout.groups else "pods"
    where = f"in {layout.count} {what}, each pod with {each}, behind {file.entry}"
    if file.platform == "machine":
        where = f"on one machine with {each}, behind a gateway"
    options = shlex.join(as_flags(settings.options))
    return f"Replicas: {settings.replicas} of {file.engine}, {where}. Settings: `{options}`"


def _prediction(layout: Layout) -> list[str]:
    """What the planner says, where it was asked."""
    planned = layout.settings.planned
    if planned is None:
        return [*(f"- {note}" for note in layout.settings.notes), ""]
    total = planned.bars["total_tokens"]
    lines = [f"- {total.value:,.0f} tokens/s in all ({total.low:,.0f} to {total.high:,.0f}, 80%)"]
    if "tpot" in planned.bars:
        ttft, tpot = planned.bars["ttft"], planned.bars["tpot"]
        lines.append(f"- TTFT {ttft.value * 1e3:,.0f} ms, TPOT {tpot.value * 1e3:,.1f} ms")
    if planned.overload:
        lines.append(f"- {planned.overload}")
    lines += _priced(layout)
    return [*lines, *(f"- {note}" for note in layout.settings.notes), ""]


def _priced(layout: Layout) -> list[str]:
    """Dollars an hour and for a million tokens, of the GPUs that are paid for."""
    price, cost, hourly = layout.settings.price, layout.settings.cost, layout.hourly
    if price is None or cost is None or hourly is None:
        return [f"- no {layout.file.price} price of {layout.file.gpu} is known: give dollars:"]
    used, paid = layout.gpus * layout.count * layout.file.hosts, layout.paid_gpus(layout.count)
    million = cost.million
    bar = [one * paid / used for one in (million.value, million.low, million.high)]
    lines = [
        f"- {price.kind} at ${price.dollars:.2f} a GPU-hour ({price.provider}, {price.date}): "
        f"${hourly:,.2f} an hour while all run, ${bar[0]:.3f} ({bar[1]:.3f} to {bar[2]:.3f}) for a "
        "million tokens while full"
    ]
    if paid > used:
        lines.append(f"- {paid} GPUs are paid for and {used} are used: machines have "
                     f"{layout.machine_gpus(layout.gpus)}")  # fmt: skip
    return lines


def _steps(layout: Layout, files: Sequence[str]) -> list[str]:
    file, space = layout.file, f"-n {layout.file.namespace}"
    steps = [f"`{command}`" for command in build_commands(layout)]
    if file.platform == "machine":
        return steps + _on_machine(layout)
    steps.append(_cluster(layout))
    steps.append("`kubectl apply -k cluster`: nothing that costs")
    steps += _secrets(layout)
    if "model/kustomization.yaml" in files:
        steps.append(_download(layout))
    if "model/publish/kustomization.yaml" in files:
        steps.append(
            f"`kubectl apply -k model/publish`; then `kubectl wait {space} --for=jsonpath="
            f"'{{.status.readyToUse}}'=true volumesnapshot/{layout.volume} --timeout=2h`"
        )
    steps.append("`millrace deploy check deploy.yaml` says what the cluster still lacks")
    if file.entry == "inference-pool":
        steps.append(f"`{install_router(layout.name, file.namespace, file.router.version)}`")
    steps.append(f"`kubectl apply -k overlays/{file.platform}`{_from_now_on(layout)}")
    steps.append("`millrace deploy status deploy.yaml` follows the start, which takes minutes")
    steps.append(_first_request(layout))
    if "bench/kustomization.yaml" in files:
        steps.append(_bench(layout))
    steps.append(_end(layout, files))
    return steps


def _cluster(layout: Layout) -> str:
    if layout.file.platform == "plain":
        return "`./cluster.sh` adds what the cluster lacks: nothing that costs"
    return (
        "`./cluster.sh` makes the cluster and what it needs: about $0.10 an hour for its control "
        "plane, and its machines without GPUs"
    )


def _on_machine(layout: Layout) -> list[str]:
    hourly = f": {_dollars(layout.hourly)} an hour" if layout.file.has_gpus else ""
    test = f'{{"model": "{layout.served_name}", "prompt": "Hello", "max_tokens": 16}}'
    return [
        "`millrace doctor` says what the machine lacks",
        f"with Docker: `docker compose -f compose/compose.yaml up -d` downloads and starts{hourly}",
        "or with systemd: Millrace in /opt/millrace, the model in "
        f"{layout.directory}, `systemd/fleet.yaml` in /etc/millrace, and "
        "`systemctl enable --now millrace` with `systemd/millrace.service` in /etc/systemd/system",
        f"`curl --json '{test}' http://127.0.0.1:8000/v1/completions`",
        "`millrace fleet status http://127.0.0.1:8000` shows the replicas",
    ]


def _end(layout: Layout, files: Sequence[str]) -> str:
    end = f"To pay no GPUs any more: `kubectl delete -k overlays/{layout.file.platform}`"
    if "model/kustomization.yaml" not in files:
        return end
    folders = [path.rsplit("/", 1)[0] for path in ("model/publish/kustomization.yaml",
               "model/kustomization.yaml") if path in files]  # fmt: skip
    deletes = " and ".join(f"`kubectl delete -k {folder}`" for folder in folders)
    return f"{end}; the model's disk of {layout.model_size} costs until {deletes}"


def _from_now_on(layout: Layout) -> str:
    """What the fleet costs; of one that is scaled, at its most and at its least."""
    if not layout.file.has_gpus:
        return ""
    scaled = layout.file.autoscale
    if scaled is None:
        return f": {_dollars(layout.hourly)} an hour from now on"
    least, most = (_dollars(layout.hourly_of(pods)) for pods in (scaled.min, scaled.max))
    return f": from now on {least} an hour with {scaled.min} pods, {most} with {scaled.max}"


def _dollars(value: float | None) -> str:
    return "an unknown price" if value is None else f"${value:,.2f}"


def _secrets(layout: Layout) -> list[str]:
    file, space = layout.file, f"-n {layout.file.namespace}"
    found = []
    if file.hub_token_secret:
        found.append(f"`kubectl create secret generic {file.hub_token_secret} {space} "
                     '--from-literal=HF_TOKEN="$HF_TOKEN"`')  # fmt: skip
    if file.api_key_secret:
        found.append(f"`kubectl create secret generic {file.api_key_secret} {space} "
                     '--from-literal=api-key="$(openssl rand -hex 32)"`')  # fmt: skip
    return found


def _download(layout: Layout) -> str:
    planned = layout.settings.planned
    cost = ""
    if planned is not None:
        hours = planned.memory.weights * layout.settings.ranks / DOWNLOAD_RATE / 3600
        minutes = max(1, round(hours * 60))
        cost = (
            f", some {minutes} minutes at 200 MB/s on a machine without GPUs: about "
            f"${max(0.01, hours * CHEAP_MACHINE):.2f}"
        )
    disk = " to a disk that many machines read later" if by_snapshot(layout) else ""
    return (
        f"`kubectl apply -k model`, then `kubectl wait -n {layout.file.namespace} "
        f"--for=condition=complete job/{layout.name}-download --timeout=6h`: downloads and checks "
        f"the model{disk}{cost}"
    )


def _first_request(layout: Layout) -> str:
    key = ' -H "Authorization: Bearer $KEY"' if layout.file.api_key_secret else ""
    target = f"svc/{layout.entry}"
    if layout.file.entry == "inference-pool":
        target = f"svc/$(kubectl get svc -n {layout.file.namespace} -l gateway.networking.k8s.io/"
        target += f"gateway-name={layout.entry} -o name | head -1 | cut -d/ -f2)"
    body = f'{{"model": "{layout.served_name}", "prompt": "Hello", "max_tokens": 16}}'
    return (
        f"`kubectl port-forward -n {layout.file.namespace} {target} 8080:80`, and in another "
        f"terminal `curl{key} --json '{body}' http://127.0.0.1:8080/v1/completions`"
    )


def _bench(layout: Layout) -> str:
    part = layout.file.bench
    assert part is not None
    gpus = layout.machine_gpus(layout.bench_gpus)
    price = layout.settings.price
    cost = f", ${price.dollars * gpus:,.2f} an hour for its {gpus} GPUs" if price else ""
    group = bench_group_command(layout)
    first = f"`{group}`, as its machine is a larger one; then " if group else ""
    return (
        f"{first}`kubectl apply -k bench` and `kubectl logs -n {layout.file.namespace} -f "
        f"job/{layout.name}-bench`: the table of {', '.join(map(str, part.replicas))} "
        f"replicas{cost}; its pods keep no GPUs once the Job has ended, but `{layout.name}"
        "-bench-shell` does until it is deleted"
        + ("; delete the node group `bench` in the end, too" if group else "")
    )
