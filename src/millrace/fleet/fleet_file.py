"""The file of `millrace fleet`: what runs on this host, how many times, behind which gateway."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from millrace.common.yaml_file import read_mapping
from millrace.errors import UserError
from millrace.fleet.device_assignment import Device
from millrace.gateway.common.limits import GatewayLimits, ScalePolicy
from millrace.gateway.common.replica_spec import DEFAULT_POLICY, HealthPolicy, PolicyName
from millrace.gateway.relay.access import Access


class FleetFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys as the flags of `millrace gateway` have them, with underscores.

    model: a name or a directory; `args` are more arguments of `millrace serve`. command: another
    server that takes --host and --port and answers GET /health, instead of a model. replicas: how
    many. environment: their variables, besides this process's. drain_timeout: seconds that running
    requests get when a replica is replaced, or everything stops. limits, scale, health, access:
    groups of the gateway's flags.
    """

    model: str | None = None
    args: list[str] = []
    command: list[str] = []
    replicas: int = 1
    gpus_per_replica: int = 1
    device: Device = "auto"
    environment: dict[str, str] = {}
    host: str = "127.0.0.1"
    port: int = 8000
    processes: int = 1
    policy: PolicyName = DEFAULT_POLICY
    admin_port: int | None = None
    admin_uds: str | None = None
    access_log: str | None = None
    start_timeout: float = 900.0
    stop_timeout: float = 15.0
    drain_timeout: float = 30.0
    limits: GatewayLimits = GatewayLimits(hold_timeout=60.0)
    scale: ScalePolicy = ScalePolicy()
    health: HealthPolicy = HealthPolicy()
    access: Access = Access()

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
    if (found.model is None) == (not found.command):
        raise UserError(f"{path}: give model or command, one of them")
    if found.replicas < 1:
        raise UserError(f"{path}: replicas: {found.replicas}; use 1 or more")
    return found
