"""Decode steps with and without kernels that are launched before the one in front has ended.

The ways are those of `launches.py`. The graphs of decode steps are captured in each way by turns,
in one process (see their seconds, too).

Qwen3.5-27B-FP8 shapes on one GPU: `--rows` sequences decode with one draft, as in `mixed_step.py`.

    python benchmarks/early_launch_h200.py --rows 32 --turns 2
    python benchmarks/early_launch_h200.py --tiny      # small, on any machine; all ways are alike
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from h200_throughput import BASE
from launches import WAYS, choose_launches
from mixed_step import Bench, beside
from model_shapes import write_config

from millrace.model.tiny import TinyShape, config_json


def choose(bench: Bench, way: str) -> float:
    """Capture all graphs in one of the ways; returns seconds."""
    choose_launches(way)
    began = time.perf_counter()
    bench.worker.runner.release()
    bench.worker.runner.capture(bench.worker.config)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--ways", default=",".join(WAYS[1:]))
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.rows = 2 if options.tiny else options.rows
    options.seqs = options.rows + 2
    BASE["prefill_graphs"] = False
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent)
        if options.tiny:
            (directory / "config.json").write_text(json.dumps(config_json(TinyShape(fp8=True))))
        else:
            write_config(directory, options.layers)
        bench = Bench(options, directory)
        print(f"ready after {bench.start_s:.1f} s", flush=True)
        rows = list(range(1, options.rows + 1))
        most = bench.prompt + (400 if options.tiny else 1100)
        found: dict[str, list[float]] = {way: [] for way in options.ways.split(",")}
        for _ in range(options.turns):
            for way, times in found.items():
                took = choose(bench, way)
                bench.fill(rows, bench.prompt, most, 0, 1.0)
                room = (most - bench.prompt) // 2 - 8  # steps until rows end
                step = bench.measure(beside(bench, rows, 1, 0), options.seconds, room)
                times.append(step["wall_ms"])
                took_s, joules = f"graphs {took:.1f} s", f"{step['joules']:.2f} J"
                print(f"{way}: {times[-1]:.3f} ms a step, {joules} ({took_s})", flush=True)
        bench.engine.close()
    medians = {way: round(statistics.median(times), 3) for way, times in found.items()}
    print(json.dumps({"rows": options.rows, **medians}))


if __name__ == "__main__":
    main()
