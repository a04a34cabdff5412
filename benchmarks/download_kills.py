"""What kill -9 costs a download: bytes that were sent twice, after 30 kills on the way.

    python -m benchmarks.download_kills [--kills 30] [--out FILE]

A hub in this process sends a file to `millrace download`, which is killed in the middle of it and
started again, until it is there. Once the hub does what it should; once it also cuts every
connection after 3 MB and lets its signed urls expire. A chunk is the least that a connection asks
for. Exit status 1 if the file is not the same, or if kills cost more than a chunk each on average.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from millrace.download.fetcher import SPAN_BYTES
from tests.download.fake_hub import Faults, fake_hub, large_file
from tests.download.kills import killed_until_done

RATE = 20_000_000  # bytes a second of each connection, so that there is time to kill
HUBS = {
    "works": lambda: Faults(rate=RATE),
    "cuts, and urls expire": lambda: Faults(rate=RATE, cut_every=3_000_000, expire=1),
}


def measure(name: str, kills: int, folder: Path) -> dict[str, Any]:
    size = kills * SPAN_BYTES[0]
    content = large_file(size)
    with fake_hub({"config.json": b"{}", "model.safetensors": content}, HUBS[name]()) as hub:
        done = killed_until_done(hub, folder / "out", kills)
        twice = hub.sent["model.safetensors"] - size
    same = (folder / "out" / "model.safetensors").read_bytes() == content
    return {"hub": name, "kills": done, "bytes": size, "sent_twice": twice, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows, right = [], True
    print("hub                      kills     bytes  sent twice  of a chunk, per kill  same")
    for name in HUBS:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, options.kills, Path(folder))
        each = row["sent_twice"] / max(row["kills"], 1) / SPAN_BYTES[0]
        print(
            f"{name:24} {row['kills']:5} {row['bytes']:9,} {row['sent_twice']:11,} {each:21.1%}  "
            f"{'yes' if row['same'] else 'NO'}",
            flush=True,
        )
        right = right and row["same"] and each <= 1
        rows.append(row)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
