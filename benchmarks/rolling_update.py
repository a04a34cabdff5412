"""Rolling updates of a running fleet under load, and how many requests they lose.

    python benchmarks/rolling_update.py [--machines 2] [--replicas 2] [--streams 6] [--out FILE]

`millrace fleet up` runs on each machine (here: processes on addresses of loopback), and with
several one more in front of them, which has their addresses in a file. Clients stream without a
pause, one request after the other. Meanwhile the files are changed and `millrace fleet restart` is
run, three times: to another model, to other options, and to a model that does not exist. The first
two must replace every replica, the third must leave every replica as it was. Exit status 1
otherwise, or if one request was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from streams import stream_while

from millrace.common.http_client import Target, fetch
from millrace.common.sockets import free_port

KEY = "benchmark"
ARGS = ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(100 << 20)]
ARGS += ["--max-num-seqs", "16", "--served-model-name", "the-model"]
OPTION = ["--max-num-batched-tokens", "1024"]
START_SECONDS = 300.0


@dataclass(frozen=True)
class Update:
    """name: of the row. model, more: what the files are changed to. works: whether it should."""

    name: str
    model: str
    more: list[str]
    works: bool = True


@dataclass
class Machine:
    """A fleet's file and the process that runs it."""

    file: Path
    keys: dict[str, Any]
    process: asyncio.subprocess.Process | None = None

    @property
    def admin(self) -> str:
        return f"http://{self.keys['admin_host']}:{self.keys['admin_port']}"

    def write(self, **changes: Any) -> None:
        self.keys |= changes
        self.file.write_text(yaml.safe_dump(self.keys))

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace", "fleet", "up", str(self.file)),
            stderr=self.file.with_suffix(".log").open("w"),
        )
        target, end = Target(self.keys["host"], self.keys["port"]), time.monotonic() + START_SECONDS
        while True:
            try:
                if (await fetch(target, "/health")).status == 200:
                    return
            except OSError:
                pass
            if self.process.returncode is not None or time.monotonic() > end:
                raise SystemExit(self.file.with_suffix(".log").read_text()[-2000:])
            await asyncio.sleep(0.2)

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await self.process.wait()


def machine(folder: Path, name: str, host: str, **keys: Any) -> Machine:
    made = Machine(folder / f"{name}.yaml", {"host": host, "port": free_port(host), **keys})
    made.write(admin_host=host, admin_port=free_port(host), device="cpu", drain_timeout=10.0)
    made.write(access={"admin_key": KEY}, environment={"OMP_NUM_THREADS": "1"})
    return made


def machines(folder: Path, options: argparse.Namespace) -> list[Machine]:
    """The machines, with replicas; with several, one more at the end that has none."""
    replicas: dict[str, Any] = {"model": options.models[0], "args": ARGS}
    replicas["replicas"] = options.replicas
    if options.machines == 1:
        return [machine(folder, "fleet", "127.0.0.1", **replicas)]
    made = []
    for number in range(options.machines):
        host = f"127.0.0.{number + 2}"
        made.append(machine(folder, f"machine-{number}", host, replica_host=host, **replicas))
    listed = folder / "machines.txt"
    listed.write_text("".join(f"{one.admin}\n" for one in made))
    return [
        *made,
        machine(folder, "front", "127.0.0.1", replicas=0, machines_file=listed.name),
    ]


async def restart(front: Machine) -> tuple[int, str]:
    """(exit status, what it said) of `millrace fleet restart`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "millrace", "fleet", "restart", front.admin, "--api-key", KEY),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    return await process.wait(), said.decode().strip().splitlines()[-1]


async def commands_of(machines: list[Machine]) -> list[str]:
    """The command lines of all replicas."""
    found = []
    for one in machines:
        assert one.process is not None
        children = await asyncio.create_subprocess_exec(
            *("ps", "--ppid", str(one.process.pid), "-o", "args=", "ww"),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await children.communicate()
        found += [line for line in said.decode().splitlines() if " serve " in line]
    return found


async def scenario(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    made = machines(folder, options)
    front, rows, ends = made[-1], list[dict[str, Any]](), Counter[str]()
    loading = True
    try:
        for one in made:
            await one.start()
        target = Target(front.keys["host"], front.keys["port"])
        clients = [
            asyncio.create_task(
                stream_while(target, n, lambda: loading, ends, tokens=64, model="the-model")
            )
            for n in range(options.streams)
        ]
        await asyncio.sleep(2.0)
        for update in (
            Update("another model", options.models[1], []),
            Update("other options", options.models[1], OPTION),
            Update("a model that is not there", "/no/such/model", [], works=False),
        ):
            rows.append(await measure(update, made, ends, options))
            print_row(rows[-1])
        await asyncio.sleep(2.0)
        loading = False
        await asyncio.gather(*clients)
    finally:
        loading = False
        for one in reversed(made):
            await one.stop()
    rows.append({"name": "in all", **counts(ends), "right": not counts(ends)["lost"]})
    print_row(rows[-1])
    print(dict(ends))
    return rows


async def measure(
    update: Update, made: list[Machine], ends: Counter[str], options: argparse.Namespace
) -> dict[str, Any]:
    """One update while clients stream."""
    before, there, began = Counter(ends), await commands_of(made), time.monotonic()
    for one in made:
        if one.keys.get("model"):
            one.write(model=update.model, args=[*ARGS, *update.more])
    status, said = await restart(made[-1])
    seconds, now = time.monotonic() - began, await commands_of(made)
    wanted = " ".join(["serve", update.model, *ARGS, *update.more, "--host"])
    replaced = sum(wanted in line for line in now)
    if update.works:
        right = status == 0 and replaced == options.replicas * options.machines
    else:
        right = status != 0 and sorted(now) == sorted(there)
    row = {"name": update.name, "seconds": round(seconds, 1), "replaced": replaced, "said": said}
    return {**row, **counts(ends - before), "right": right}


def counts(ends: Counter[str]) -> dict[str, int]:
    return {"whole": ends["whole"], "lost": ends.total() - ends["whole"]}


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['name']:26} {row.get('seconds', ''):>8} {row.get('replaced', ''):>9} "
        f"{row['whole']:>7} {row['lost']:>5}  {'' if row['right'] else 'WRONG: '}"
        f"{row.get('said', '')}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs=2, default=["millrace-mini", "millrace-mini-int4"])
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=2, help="of each machine")
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(f"{'update to':26} {'seconds':>8} {'replaced':>9} {'whole':>7} {'lost':>5}")
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(scenario(options, Path(folder)))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    raise SystemExit(0 if all(row["right"] for row in rows) else 1)


if __name__ == "__main__":
    main()
