"""`millrace serve` with the fake engine. Arguments: EngineArgs and ServerOptions, as JSON,
and what constants of modules, named as `package.module:NAME`, are set to, where a test would wait.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import msgspec

from millrace.config import EngineArgs
from millrace.errors import UserError
from millrace.logs.setup import set_up_logs
from millrace.server.options import ServerOptions
from millrace.server.run import run_server

PROGRAM = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))


def main() -> int:
    set_up_logs("server")
    constants = sys.argv[3] if len(sys.argv) > 3 else "{}"
    for name, value in msgspec.json.decode(constants).items():
        module, _, constant = name.partition(":")
        setattr(importlib.import_module(module), constant, value)
    args = msgspec.json.decode(sys.argv[1], type=EngineArgs)
    options = msgspec.json.decode(sys.argv[2], type=ServerOptions)
    try:
        return run_server(args, options, PROGRAM)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
