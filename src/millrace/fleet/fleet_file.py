"""The file of `millrace fleet`: what runs on this host and on which others, and their gateway."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from millrace.common.yaml_file import read_mapping
from millrace.errors import UserError
from millrace.fleet.device_assignment import Device
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.processes.options import GatewayOptions, GatewaySettings


class FleetFile(GatewaySettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of the gateway, by the names of its flags with underscores, and these.

    model: a name or a directory; `args` are more arguments of `millrace serve`. command: another
    server that takes --host and --port and answers GET /health, instead of a model. replicas: how
    many. replica_host, replica_port: where they listen, the first at that port, the others behind
    it; free ports without one. machines_file: machines with replicas of their own (machines.py).
    environment: variables of the replicas, besides this process's. drain_timeout: seconds that
    running requests get when a replica is replaced, or everything stops.
    """

    model: str | None = None
    args: list[str] = msgspec.field(default_factory=list)
    command: list[str] = msgspec.field(default_factory=list)
    replicas: int = 1
    replica_host: str = "127.0.0.1"
    replica_port: int | None = None
    machines_file: str | None = None
    gpus_per_replica: int = 1
    device: Device = "auto"
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    start_timeout: float = 900.0
    stop_timeout: float = 15.0
    drain_timeout: float = 30.0
    limits: GatewayLimits = GatewayLimits(hold_timeout=60.0)
    merge_metrics: bool = True

    @property
    def gateway(self) -> GatewayOptions:
        """The gateway's options, without replicas."""
        settings = {name: getattr(self, name) for name in GatewaySettings.__struct_fields__}
        return GatewayOptions(**settings)

    def replica_command(self) -> Sequence[str]:
        """What starts a replica, without its host and port."""
        if self.model is not None:
            return [sys.executable, "-m", "millrace", "serve", self.model, *self.args]
        return self.command


def read_fleet_file(path: Path) -> FleetFile:
    """The file's content. Raises UserError that names the key that is wrong."""
    content = read_mapping(path, str(path), "model: millrace-mini")
    try:
        found = msgspec.convert(content, FleetFile)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error}") from None
    if found.machines_file is not None:
        machines = str(path.parent / found.machines_file)
        found = msgspec.structs.replace(found, machines_file=machines)
    if found.replicas == 0 and found.machines_file is not None:
        return found
    if found.replicas < 1:
        raise UserError(
            f"{path}: replicas: {found.replicas}; use 1 or more, or 0 with a machines_file"
        )
    if (found.model is None) == (not found.command):
        raise UserError(f"{path}: give model or command, one of them")
    if found.replica_port is not None and not 0 < found.replica_port <= 65536 - found.replicas:
        raise UserError(f"{path}: replica_port: {found.replica_port}: use 1 to 65535")
    return found
