"""`millrace simulate`: a fleet on a virtual clock."""

from __future__ import annotations

from typing import Any

import click

from millrace.bench.flags.command_line import SeveralValues
from millrace.common.flags import struct_options
from millrace.simulate.flags import HELP, SKIPPED, SimulateFlags


@click.command(cls=SeveralValues)
@struct_options(SimulateFlags, HELP, skip=SKIPPED)
def simulate(**values: Any) -> None:
    """Simulate a fleet: the scheduler and the policies that serve, on a virtual clock.

    The load is given as to `millrace bench serve`. The time of a step comes from a step model: that
    of a GPU and a model, or one that was fitted (--step-model).
    """
    from millrace.simulate.run import run_flags

    run_flags(values)
