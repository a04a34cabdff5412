"""How a visit goes: a server is started with its settings, loaded, and ended.

What goes wrong with it is part of what the visit found. Which kind of server it is, is not known
here.
"""

from __future__ import annotations

import time
from itertools import repeat

from millrace.errors import UserError
from millrace.tune.servers.load import HungError, check_accuracy, run_load
from millrace.tune.servers.running import RunningServer, Servers, StartError, Visits
from millrace.tune.trials.failures import Failure, failed_request
from millrace.tune.trials.outcome import Outcome, Run, Visit


class ServerTarget:
    """The tuner's target: servers of one kind."""

    def __init__(self, servers: Servers, visits: Visits) -> None:
        self._servers = servers
        self._visits = visits

    async def visit(self, visit: Visit) -> Outcome:
        """As TuningTarget.visit. Raises InterruptedRunError when the study is stopped."""
        began = time.monotonic()
        runs: list[Run] = []
        try:
            async with self._servers.started(visit) as server:
                ready = time.monotonic() - began
                failure = await self._loads(visit, server, runs)
                found = None
                if failure is None and visit.accuracy:
                    plan, stop = self._visits.plan, self._visits.stop
                    found = await check_accuracy(plan, server.target, stop)
        except StartError as error:
            return Outcome(failure=error.failure, seconds=time.monotonic() - began)
        return Outcome(
            runs=tuple(runs),
            failure=failure,
            accuracy=found.value if found else None,
            items=found.items if found else 0,
            seconds=time.monotonic() - began,
            start_seconds=ready,
        )

    async def _loads(self, visit: Visit, server: RunningServer, runs: list[Run]) -> Failure | None:
        """A load for each seed; the failure that ended them, if one did."""
        plan = self._visits.plan
        for seed, streams in zip(visit.seeds, visit.streams or repeat(0), strict=False):
            load = plan.options(server.target, seed, short=visit.purpose != "full", streams=streams)
            try:
                runs.append(await run_load(plan, load, stop=self._visits.stop, ended=server.ended))
            except HungError as error:
                return Failure("hang", "run", str(error))
            except UserError as error:
                if not server.ended.is_set() and not server.reader.seen:
                    return failed_request(str(error))
                return server.reader.failure("run", server.status)
            if server.ended.is_set() or (runs[-1].failed and server.reader.seen):
                return server.reader.failure("run", server.status)
        return None
