"""Starts the example: a gateway with two replicas, the store, the web application.

    python -m examples.insurance [--build]

--build makes the store and ends. All that is kept is in build/insurance.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import uvicorn
from openai import AsyncOpenAI

from examples.insurance.assistant.answer import Assistant
from examples.insurance.build import search_of, store_of
from examples.insurance.documents.insurer import draw_insurer
from examples.insurance.web.app import Application, Services
from examples.insurance.web.records import Records
from examples.insurance.web.sessions import Credentials

READY_SECONDS = 180.0
STOP_SECONDS = 40.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--build", action="store_true", help="make the store and end")
    parser.add_argument("--folder", type=Path, default=Path("build/insurance"))
    parser.add_argument("--policies", type=int, default=2000)
    parser.add_argument("--model", default="millrace-mini-insurance")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--gateway-port", type=int, default=8081)
    return parser.parse_args()


def start_gateway(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """`millrace serve` with two replicas behind one gateway; its words go to a file."""
    command = [
        sys.executable, "-m", "millrace", "serve", args.model, "--replicas", "2",
        "--port", str(args.gateway_port), "--served-model-name", "millrace-mini",
        "--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}',
    ]  # fmt: skip
    with (args.folder / "gateway.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise SystemExit(f"the gateway did not start: see {log}")


def installation_key(path: Path) -> bytes:
    """Made once; the customers' access codes follow from it."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()


def main() -> None:
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    insurer = draw_insurer(args.policies)
    if args.build:
        store_of(insurer, args.folder / "store")
        return
    gateway = start_gateway(args)
    try:
        serve(args, gateway)
    finally:
        gateway.send_signal(signal.SIGTERM)
        try:
            gateway.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            gateway.kill()
            gateway.wait()


def serve(args: argparse.Namespace, gateway: subprocess.Popen[bytes]) -> None:
    insurer = draw_insurer(args.policies)
    store = store_of(insurer, args.folder / "store")
    search = search_of(insurer, store, args.folder / "store")
    url = f"http://127.0.0.1:{args.gateway_port}"
    wait_ready(url, gateway, args.folder / "gateway.log")
    password = os.environ.get("INSURANCE_OPERATOR_PASSWORD") or secrets.token_urlsafe(9)
    numbers = frozenset(search.access.forms)
    credentials = Credentials(numbers, installation_key(args.folder / "key"), password)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
    services = Services(
        assistant=Assistant(insurer, search, client),
        store=store,
        access=search.access,
        credentials=credentials,
        audit=Records(args.folder / "audit.jsonl"),
        feedback=Records(args.folder / "feedback.jsonl"),
        gateway=url,
    )
    one = insurer.policies[0].number
    print(f"http://127.0.0.1:{args.port}", flush=True)
    print(f"customer: policy {one}, code {credentials.code(one)}; operator: password {password}")
    sys.stdout.flush()
    uvicorn.run(Application(services).asgi(), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
