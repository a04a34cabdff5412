"""Downloads that are killed again and again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.download.fake_hub import MODEL, FakeHub


def killed_until_done(server: FakeHub, out: Path, kills: int) -> int:
    """Download with so many kill -9s on the way; how many there were."""
    command = [sys.executable, "-m", "millrace", "download", MODEL, "--endpoint", server.url]
    command += ["--local-dir", str(out), "--quiet"]
    done = 0
    while True:
        before = sum(server.sent.values())
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while done < kills and process.poll() is None:
            if sum(server.sent.values()) > before + 300_000:  # it is in the middle of it
                time.sleep(0.01 * (done % 7))
                process.send_signal(signal.SIGKILL)
                done += 1
                break
            time.sleep(0.002)
        if process.wait(timeout=60) != -signal.SIGKILL:
            assert process.returncode == 0
            return done
