"""The program that runs the batches of a directory, beside the server that answers its API.

Arguments: the directory, the server's URL, the requests that one batch may have in flight, the most
bytes of all files, and the id of the parent process, with which it ends. The server's API key comes
in the environment.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
from pathlib import Path

import msgspec

from millrace.batch.endpoint import HttpEndpoint
from millrace.batch.jobs.catalog import Catalog
from millrace.batch.jobs.job_runner import JobRunner
from millrace.common.child_process import end_with_parent
from millrace.common.http_client import parse_base_url
from millrace.common.safe_log import protect_standard_streams
from millrace.common.tasks import restarted
from millrace.logs.setup import set_up_logs

logger = logging.getLogger("millrace.batches")

KEY_VARIABLE = "MILLRACE_BATCH_API_KEY"
LOCK_SECONDS = 1.0  # between two looks whether another worker has gone


async def main(directory: Path, url: str, most_in_flight: int, most_bytes: int) -> None:
    """Run batches until the process ends."""
    lock = os.open(directory / "worker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    await _wait_for(lock, directory)
    key = os.environ.get(KEY_VARIABLE)
    headers = [("Authorization", f"Bearer {key}")] if key else []
    # The certificate names the server's public name, and this is the same machine.
    target = msgspec.structs.replace(parse_base_url(url), verify=False)
    runner = JobRunner(
        Catalog(directory, most_bytes),
        lambda: HttpEndpoint(target, headers),
        most_in_flight,
        logger.warning,
    )
    await restarted("the batches", runner.run, logger.warning)


async def _wait_for(lock: int, directory: Path) -> None:
    """Wait until no other worker runs the batches of the directory."""
    said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if not said:
                logger.warning(
                    "%s: another server runs its batches; waiting for its end", directory
                )
            said = True
            await asyncio.sleep(LOCK_SECONDS)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[5]))
    protect_standard_streams()
    set_up_logs("batches")
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
