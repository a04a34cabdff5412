"""One machine without Kubernetes: `millrace fleet` in a container (Compose) or under systemd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from millrace.deploy.layout.commands import download_command, engine_words
from millrace.deploy.layout.layout import CACHES, ENGINE_END, MODELS, PORT, Layout
from millrace.deploy.layout.yaml_text import yaml_text
from millrace.deploy.manifests.parts import USER
from millrace.fleet.fleet_file import FleetFile
from millrace.fleet.systemd_unit import unit_text

INSTALLED = Path("/etc/millrace/fleet.yaml")
PYTHON = Path("/opt/millrace/bin/python")


def machine_files(layout: Layout) -> dict[str, str]:
    """Path -> text."""
    return {
        "compose/compose.yaml": yaml_text(compose(layout)),
        "compose/fleet.yaml": yaml_text(fleet(layout, "0.0.0.0")),
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
    """A compose file: the model is downloaded first, and the fleet starts when it is complete."""
    services: dict[str, Any] = {}
    if not layout.ships:
        services["download"] = _service(
            layout, layout.cpu_image, download_command(layout), [f"model:{MODELS}"], restart="no"
        )
        services["download"]["environment"] = ["HF_TOKEN"]  # from whoever starts it
    services["fleet"] = _fleet_service(layout)
    return {
        "name": layout.name,
        "services": services,
        "volumes": {"cache": {}, **({} if layout.ships else {"model": {}})},
    }


def _fleet_service(layout: Layout) -> dict[str, Any]:
    path = str(INSTALLED)
    mounts = [f"./fleet.yaml:{path}:ro", f"cache:{CACHES}"]
    mounts += [] if layout.ships else [f"model:{MODELS}:ro"]
    command = ["millrace", "fleet", "up", path]
    found = _service(layout, layout.image, command, mounts, restart="unless-stopped")
    probe = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health', timeout=4)"
    found |= {
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],  # for this machine; put TLS and keys before others
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
    if layout.file.has_gpus:
        count = layout.settings.ranks * layout.settings.replicas
        device = {"driver": "nvidia", "count": count, "capabilities": ["gpu"]}
        found["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return found


def _service(
    layout: Layout, image: str, command: list[str], mounts: list[str], restart: str
) -> dict[str, Any]:
    """A service as nobody special, which writes nothing but its volumes."""
    return {
        "image": image,
        "command": command,
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
