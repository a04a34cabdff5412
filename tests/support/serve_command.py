"""`millrace serve` with the fake engine: the same arguments, the same server, no model.

python tests/support/serve_command.py MODEL --port 8000 ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from millrace import cli
from millrace.server import run

PROGRAM = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
COMMAND = (sys.executable, str(Path(__file__)))


def main(arguments: list[str]) -> int:
    serve = run.run_server
    run.run_server = lambda args, options, program=PROGRAM: serve(args, options, program)
    # A server that watched it would run without the fake engine.
    return cli.run(["serve", *arguments, "--max-server-restarts", "0"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
