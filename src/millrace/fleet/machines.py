"""Replicas of other machines, on each of which a `millrace fleet up` of its own runs.

A file has the URL of each machine's gateway, where it takes changes. The machines say which
replicas they run, so the gateway here sends requests to these directly, and they replace one when
they are told to. Nothing is started here, and nobody logs in anywhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from millrace.common.http_client import Target, parse_url
from millrace.errors import UserError
from millrace.fleet.rolling_update import GatewayReplica, Replaceable
from millrace.gateway.admin.client import ask
from millrace.gateway.app import Gateway
from millrace.gateway.common.replica_spec import ReplicaSpec
from millrace.gateway.relay.access import is_loopback

_SILENCE = 30.0  # seconds without an answer after which a machine that replaces a replica is lost
_STEP = 0.5  # seconds between two looks at it


class Machines:
    """The machines of a file, as a source of replicas (gateway/health/discovery.py).

    key: the admin key of all of them. log: takes a line when one does not answer. A machine that
    does not answer keeps the replicas that it had; the file is read again every second.
    """

    interval = 1.0

    def __init__(self, path: Path, key: str | None, log: Callable[[str], None]) -> None:
        self.name = f"machines of {path}"
        self._path = path
        self._key = key
        self._log = log
        self._replicas: dict[Target, list[Target]] = {}
        self._problems: dict[Target, str] = {}

    async def read(self) -> list[ReplicaSpec]:
        """All replicas. Raises UserError or OSError if the file cannot be read."""
        machines = read_machines_file(self._path)
        found = await asyncio.gather(*(self._read_or_keep(machine) for machine in machines))
        self._replicas = dict(zip(machines, found, strict=True))
        self._problems = {m: p for m, p in self._problems.items() if m in self._replicas}
        every = dict.fromkeys(target for targets in found for target in targets)
        return [ReplicaSpec(target=target, source=self.name) for target in every]

    def document(self) -> list[dict[str, Any]]:
        """Each machine: its URL, its replicas, and why it does not answer."""
        return [
            {
                "url": str(machine),
                "replicas": [str(target) for target in targets],
                "problem": self._problems.get(machine),
            }
            for machine, targets in self._replicas.items()
        ]

    async def replaceable(self, gateway: Gateway, holds: bool) -> list[Replaceable]:
        """The replicas of all machines, behind a gateway that has them all. Raises UserError if a
        machine does not answer."""
        found: list[Replaceable] = []
        for machine in read_machines_file(self._path):
            for number, target in enumerate(await self._read(machine)):
                start = partial(self._restart, machine, number)
                found.append(GatewayReplica(gateway, target, start, holds))
        return found

    async def _read_or_keep(self, machine: Target) -> list[Target]:
        try:
            found = await self._read(machine)
        except UserError as error:
            if self._problems.get(machine) != str(error):
                self._problems[machine] = str(error)
                self._log(f"{error}; its last list of replicas is kept")
            return self._replicas.get(machine, [])
        self._problems.pop(machine, None)
        return found

    async def _read(self, machine: Target) -> list[Target]:
        """The replicas of a machine, by number."""
        fleet = await self._call(machine, "GET", "/gateway/fleet")
        targets = [parse_url(url) for url in fleet.get("replicas", ())]
        require_reachable(machine, targets)
        return targets

    async def _restart(self, machine: Target, number: int) -> None:
        """Have a machine replace one of its replicas. Raises UserError with its reason if it does
        not, or if it falls silent."""
        await self._call(machine, "POST", f"/gateway/fleet/restart?replica={number}")
        answered = time.monotonic()
        while True:
            await asyncio.sleep(_STEP)
            try:
                state = await self._call(machine, "GET", "/gateway/fleet")
            except UserError:
                if time.monotonic() - answered > _SILENCE:
                    raise
                continue
            answered = time.monotonic()
            if state["state"] == "done":
                return
            if state["state"] != "running":
                raise UserError(f"{machine}: {state['reason'] or 'it was started anew meanwhile'}")

    async def _call(self, machine: Target, method: str, path: str) -> dict[str, Any]:
        status, answer = await ask(str(machine), path, self._key, method=method)
        if status >= 400:
            reason = answer.get("error", {}).get("message", f"answered {status}")
            raise UserError(f"{machine}: {reason}")
        return answer


def read_machines_file(path: Path) -> Sequence[Target]:
    """The machines, each once. Raises UserError that names the line, or OSError."""
    found: dict[Target, None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) > 1:
            raise UserError(f"{path}:{number}: one URL a line, such as http://10.0.0.5:8001")
        try:
            found.update(dict.fromkeys(map(parse_url, words)))
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    return list(found)


def require_reachable(machine: Target, replicas: Sequence[Target]) -> None:
    """Raise UserError if replicas of another machine listen where only it reaches them."""
    for target in replicas:
        if is_loopback(target.host) and not is_loopback(machine.host):
            raise UserError(
                f"{machine}: its replicas listen on {target.host}, where only that machine reaches "
                "them; give its fleet file a replica_host, its own address"
            )
