"""A systemd unit that keeps a fleet running on one host."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from millrace.fleet.fleet_file import FleetFile, read_fleet_file

_UNIT = """\
[Unit]
Description=Millrace fleet of {file}
After=network-online.target
Wants=network-online.target

[Service]
User={user}
ExecStart={python} -m millrace fleet up {file}
WorkingDirectory={directory}
Restart=on-failure
RestartSec=5
# Running requests get drain_timeout, then replicas stop_timeout; nothing is killed before.
TimeoutStopSec={stop}
KillMode=mixed
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
"""


def unit(file: Path, user: str | None = None) -> str:
    """The text of the unit. Raises UserError if the file cannot be read or is wrong."""
    return unit_text(
        file.resolve(), read_fleet_file(file), user or getpass.getuser(), sys.executable
    )


def unit_text(file: Path, options: FleetFile, user: str, python: str) -> str:
    """The text of the unit for a fleet file that is, or will be, at that place."""
    return _UNIT.format(
        file=_quoted(str(file)),
        directory=str(file.parent).replace("%", "%%"),
        user=user,
        python=_quoted(python),
        stop=round(options.drain_timeout + options.stop_timeout + 10),
    )


def _quoted(word: str) -> str:
    """A word of ExecStart: % and quotes have a meaning there."""
    word = word.replace("%", "%%")
    return f'"{word}"' if " " in word else word
