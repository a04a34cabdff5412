"""A fleet from its file: options of the supervisor, and the run until a signal."""

from __future__ import annotations

from pathlib import Path

import uvloop

from millrace.common.safe_log import protect_standard_streams
from millrace.fleet.fleet_file import FleetFile, read_fleet_file
from millrace.fleet.supervisor import FleetOptions, run_until_stopped
from millrace.logs.setup import NO_LOG_OPTIONS, LogOptions, set_up_logs


def run_fleet(path: Path, logs: LogOptions = NO_LOG_OPTIONS) -> None:
    """Run what a fleet's file describes until SIGINT or SIGTERM. A rolling update reads it again.

    Raises UserError if the file is wrong, or the replicas cannot be started.
    """
    options = fleet_options(read_fleet_file(path))
    protect_standard_streams()
    set_up_logs("supervisor", logs)
    uvloop.run(run_until_stopped(options, lambda: read_fleet_file(path).replica_command()))


def fleet_options(file: FleetFile) -> FleetOptions:
    """The options of a supervisor, from a fleet's file."""
    return FleetOptions(
        command=file.replica_command(),
        count=file.replicas,
        host=file.host,
        port=file.port,
        gateway=file.gateway,
        replica_host=file.replica_host,
        replica_port=file.replica_port,
        machines_file=file.machines_file,
        device=file.device,
        gpus_per_replica=file.gpus_per_replica,
        start_timeout=file.start_timeout,
        stop_timeout=file.stop_timeout,
        drain_timeout=file.drain_timeout,
        environment=file.environment,
    )
