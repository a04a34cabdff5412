"""The fleet plane stands beside the engine: it loads none of it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import millrace.bench.command, millrace.gateway.command, millrace.fleet.supervisor
import millrace.gateway.serve, millrace.gateway.admin.status
from millrace.bench.runs import own_servers, reported_run, results_commands, selftest
below = ("torch", "transformers", "tokenizers", "zmq")
below += tuple(f"millrace.{name}" for name in ("engine", "runtime", "model", "kernels", "server"))
print([name for name in below if name in sys.modules])
"""


def test_commands_of_the_fleet_plane_load_no_engine_and_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
