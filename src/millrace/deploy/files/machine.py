"""One machine without Kubernetes: `millrace fleet` in a container (Compose) or under systemd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from millrace.deploy.layout.commands import download_command, engine_words
from millrace.deploy.layout.layout import CACHES, ENGINE_END, MODELS, PORT, Layout
from millrace.deploy.layout.yaml_text import yaml_text
from millrace.deploy.manifests.parts import USER
from millrace.deploy.manifests.replicas import environment
from millrace.fleet.fleet_file import FleetFile
from millrace.fleet.systemd_unit import unit_text
from millrace.plan.predict.flags import as_flags

INSTALLED = Path("/etc/millrace/fleet.yaml")
PUBLISHED = f"127.0.0.1:{PORT}:{PORT}"  # for this machine; put TLS and keys before others
PYTHON = Path("/opt/millrace/bin/python")


def machine_files(layout: Layout) -> dict[str, str]:
    """Path -> text."""
    found = {"compose/compose.yaml": yaml_text(compose(layout))}
    if layout.file.engine == "millrace":
        found["compose/fleet.yaml"] = yaml_text(fleet(layout, "0.0.0.0"))
    return found | {
        "systemd/fleet.yaml": yaml_text(fleet(layout, "127.0.0.1")),
        "systemd/millrace.service": _unit(layout),
    }


def fleet(layout: Layout, host: str) -> dict[str, Any]:
    """The content of a fleet file."""
    file = layout.file
    what: dict[str, Any] = {"model": layout.directory, "args": engine_words(layout)}
    if file.engine != "millrace":
        what = {"command": engine_words(layout)}
    return {
        **what,
        "replicas": layout.settings.replicas,
        "gpus_per_replica": layout.settings.ranks,
        "device": "auto" if file.has_gpus else "cpu",
        "host": host,
        "port": PORT,
        "processes": file.gateway.processes,
        "start_timeout": 3600.0,
        "drain_timeout": float(file.drain),
        "stop_timeout": float(ENGINE_END + 5),
        "limits": {"hold_timeout": float(file.gateway.hold_timeout)},
        **({"environment": dict(file.environment)} if file.environment else {}),
    }


def compose(layout: Layout) -> dict[str, Any]:
    """A compose file: the model is downloaded first, and the replicas start when it is complete.
    Millrace's run as a fleet in one container; others in the engine's own image, behind a gateway.
    """
    services: dict[str, Any] = {}
    if not layout.ships:
        # Docker gives a new volume the owner that its folder has in the first image which mounts
        # it; other engines' images have no such folders.
        mounts = [f"model:{MODELS}", f"cache:{CACHES}"]
        services["download"] = _service(
            layout, layout.cpu_image, download_command(layout), mounts, restart="no"
        )
        services["download"]["environment"] = ["HF_TOKEN"]  # from whoever starts it
    if layout.file.engine == "millrace":
        services["fleet"] = _fleet_service(layout)
    else:
        for number in range(layout.settings.replicas):
            services[f"replica-{number + 1}"] = _replica_service(layout, number)
        services["gateway"] = _gateway_service(layout)
    return {
        "name": layout.name,
        "services": services,
        "volumes": {"cache": {}, **({} if layout.ships else {"model": {}})},
    }


def _fleet_service(layout: Layout) -> dict[str, Any]:
    path = str(INSTALLED)
    mounts = [f"./fleet.yaml:{path}:ro", *_mounts(layout)]
    command = ["millrace", "fleet", "up", path]
    found = _service(layout, layout.image, command, mounts, restart="unless-stopped")
    found |= {"ports": [PUBLISHED], **_running(layout)}
    if layout.file.has_gpus:
        found |= _gpus({"count": layout.settings.ranks * layout.settings.replicas})
    return found


def _replica_service(layout: Layout, number: int) -> dict[str, Any]:
    """One replica of another engine, on GPUs of its own."""
    ranks = layout.settings.ranks
    command = [*engine_words(layout), "--host", "0.0.0.0", "--port", str(PORT)]
    found = _service(layout, layout.image, command, _mounts(layout), restart="unless-stopped")
    found["environment"] = {one["name"]: one["value"] for one in environment(layout)
                            if "value" in one}  # fmt: skip
    first = ranks * number
    devices = [str(device) for device in range(first, first + ranks)]
    return found | _running(layout) | _gpus({"device_ids": devices})


def _gateway_service(layout: Layout) -> dict[str, Any]:
    part = layout.file.gateway
    options = {
        "worker_urls": [f"http://replica-{number + 1}:{PORT}"
                        for number in range(layout.settings.replicas)],
        "host": "0.0.0.0",
        "port": PORT,
        "processes": part.processes,
        "hold_timeout": part.hold_timeout,
        "drain_timeout": layout.file.drain,
        **part.options,
    }  # fmt: skip
    command = ["millrace", "gateway", *as_flags(options)]
    found = _service(layout, layout.cpu_image, command, [], restart="unless-stopped")
    return found | {"ports": [PUBLISHED], **_running(layout)}


def _mounts(layout: Layout) -> list[str]:
    return [f"cache:{CACHES}", *([] if layout.ships else [f"model:{MODELS}:ro"])]


def _running(layout: Layout) -> dict[str, Any]:
    """What every server has: shared memory for ranks, time to stop, and a probe."""
    probe = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health', timeout=4)"
    found: dict[str, Any] = {
        "shm_size": "8gb",
        "stop_grace_period": f"{layout.file.drain + ENGINE_END + 20}s",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", probe],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": "1h",
        },
    }
    if not layout.ships:
        found["depends_on"] = {"download": {"condition": "service_completed_successfully"}}
    return found


def _gpus(which: dict[str, Any]) -> dict[str, Any]:
    device = {"driver": "nvidia", **which, "capabilities": ["gpu"]}
    return {"deploy": {"resources": {"reservations": {"devices": [device]}}}}


def _service(
    layout: Layout, image: str, command: list[str], mounts: list[str], restart: str
) -> dict[str, Any]:
    """A service as nobody special, which writes nothing but its volumes."""
    return {
        "image": image,
        "entrypoint": command,  # in place of the image's own
        "user": f"{USER}:{USER}",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp"],
        "volumes": mounts,
        "restart": restart,
    }


def _unit(layout: Layout) -> str:
    options = FleetFile(
        model=layout.directory,
        drain_timeout=float(layout.file.drain),
        stop_timeout=float(ENGINE_END + 5),
    )
    return unit_text(INSTALLED, options, "millrace", str(PYTHON))
