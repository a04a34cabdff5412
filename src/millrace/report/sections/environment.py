"""Environment, start-up and the load generator's own error: what is measured of the machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.load.interrupts import InterruptedRunError, unless_stopped
from millrace.bench.runs.selftest import selftest
from millrace.common.child_process import python_module
from millrace.common.http_client import fetch
from millrace.errors import UserError
from millrace.report.sections.accuracy import run_child
from millrace.report.steps.profiles import Profile
from millrace.report.steps.serving import Servers
from millrace.report.steps.step import Place, Serving, Step

_ANSWER_LIMIT = 600.0  # seconds for the first answer: kernels may be compiled for it
# Where compiled kernels are kept. The model is named by its directory, so the cache of downloads,
# which is below XDG_CACHE_HOME as well, plays no part.
_CACHES = {
    "XDG_CACHE_HOME": "",
    "TRITON_CACHE_DIR": "triton",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}


def environment_step() -> Step:
    """What `millrace doctor` says of this machine and of the model on it."""

    async def work(place: Place) -> Any:
        file = place.folder("environment") / "doctor.json"
        words = [str(place.model.directory), "--json", str(file)]
        # Its status says that something prevents a server from working; the findings say what.
        command = [*python_module("millrace.cli", "doctor"), *words]
        file.unlink(missing_ok=True)
        try:
            await run_child(command, place)
        except UserError:
            if not file.exists():
                raise
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])

    return Step(
        name="environment/doctor",
        section="environment",
        seconds=15.0,
        work=work,
        command=("millrace", "doctor", "MODEL"),
    )


def startup_steps(profile: Profile, serving: Serving, shown: Sequence[str]) -> list[Step]:
    """A cold start, with empty caches of kernels, then warm ones with what it left there.

    shown: the server's command without paths of this machine.
    """
    steps = []
    for number in range(profile.starts + 1):
        name = "startup/cold" if number == 0 else f"startup/warm/{number}"
        needs = () if number == 0 else ("startup/cold",)
        step = Step(
            name=name,
            section="startup",
            seconds=profile.start * (3 if number == 0 else 1),
            work=_starting(serving, cold=number == 0),
            command=tuple(shown),
            needs=needs,
        )
        steps.append(step)
    return steps


def _starting(serving: Serving, *, cold: bool) -> Any:
    async def work(place: Place) -> dict[str, float]:
        caches = place.directory / "caches"
        if cold:
            shutil.rmtree(caches, ignore_errors=True)
        folders = {name: caches / below for name, below in _CACHES.items()}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        variables = {name: str(folder) for name, folder in folders.items()}
        own = msgspec.structs.replace(
            serving, name="startup", environment=(*serving.environment, *variables.items())
        )
        async with Servers(place.folder("logs"), place.start_limit, place.stop) as servers:
            began = time.monotonic()
            healthy = await servers.start(own)
            target = await servers.get(own)
            body = msgspec.json.encode({"prompt": "a", "max_tokens": 1})
            asking = fetch(
                target, "/v1/completions", method="POST", body=body, timeout=_ANSWER_LIMIT
            )
            answer = await unless_stopped(asking, place.stop)
            if answer.status != 200:
                raise UserError(f"the first request got status {answer.status}")
            first = time.monotonic() - began
        return {
            "healthy_seconds": healthy,
            "first_answer_seconds": first,
            "cache_bytes": float(_bytes(caches)),
        }

    return work


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def client_step(profile: Profile) -> Step:
    """The error of the load generator against a server that stamps what it sends."""
    streams = ",".join(map(str, profile.selftest))

    async def work(place: Place) -> Any:
        levels = await selftest(profile.selftest, seconds=profile.selftest_seconds, stop=place.stop)
        if len(levels) < len(profile.selftest):
            raise InterruptedRunError
        return [{**msgspec.to_builtins(level), "within": level.within} for level in levels]

    return Step(
        name="client/selftest",
        section="client",
        seconds=len(profile.selftest) * 2 * profile.selftest_seconds,
        work=work,
        command=(
            *("millrace", "bench", "selftest", "--streams", streams),
            *("--seconds", f"{profile.selftest_seconds:g}"),
        ),
    )
