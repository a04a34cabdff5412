"""How long children take to compile DeepGEMM's kernels for Qwen3.5-27B-FP8, by their number.

    python benchmarks/prebuild_h200.py                       # needs a Hopper GPU and DeepGEMM
    python benchmarks/prebuild_h200.py --children 1,4,8,12 --compilers nvcc,nvrtc

Each run starts from an empty cache in a folder of its own. A line each: seconds until the last
child is gone, kernels in the cache, compilations beyond one each, least free GPU memory
meanwhile. With each compiler also what the largest products then take, since NVRTC's kernels may be
slower ones than nvcc's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from h200_throughput import ARRANGEMENTS, BASE
from qwen27b import write_config

from millrace.config import ModelFacts, engine_args, resolve
from millrace.kernels.gpu import prebuild
from millrace.model.config import read_config
from millrace.model.qwen3_5 import build_model
from millrace.runtime.rehearsal import token_counts
from millrace.runtime.worker import _fp8_shapes

TIMED = [(34816, 5120, 512), (5120, 17408, 512), (34816, 5120, 16384), (14336, 5120, 2560)]


def sizes() -> tuple[set[tuple[int, int]], list[int]]:
    """Weight shapes and token counts of the engine that `h200_throughput.py` measures."""
    with tempfile.TemporaryDirectory() as folder:
        model = read_config(write_config(Path(folder)))
        arguments = {**BASE, **ARRANGEMENTS["default"], "model": folder}
        facts = ModelFacts(model.max_positions, model.dtype, model.mtp_layers)
        config = resolve(engine_args(**arguments), facts, cuda=True)
    built = build_model(
        model, dtype=torch.bfloat16, device="meta", max_len=64, mtp=True, keep_fp8=True
    )
    return _fp8_shapes(built), token_counts(config)


class LeastFree:
    """The least free memory of the GPU while it is open, in bytes."""

    def __enter__(self) -> LeastFree:
        self.bytes, self._over = torch.cuda.mem_get_info()[0], threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.bytes = min(self.bytes, torch.cuda.mem_get_info()[0])


def run(products: list[prebuild.Product], count: int, compiler: str) -> dict[str, Any]:
    """One run in an empty cache, and the products' times with what it compiled."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"DG_JIT_CACHE_DIR": cache, "DG_JIT_USE_NVRTC": str(int(compiler == "nvrtc"))}
        os.environ["DG_JIT_PRINT_COMPILER_COMMAND"] = "1"
        began = time.perf_counter()
        children = prebuild.start(products, "cuda:0", count, Path(cache, "marker"))
        assert children is not None
        with LeastFree() as least:
            children.finish(300)
        seconds = time.perf_counter() - began
        children._output.seek(0)
        output = children._output.read().decode(errors="replace")
        codes = [process.returncode for process in children.processes]
        children.close()
        kernels = len(list(Path(cache, "cache").glob("kernel.*")))
        compiled = output.count("Running NVCC command") + output.count("with NVRTC options")
        again = subprocess.run(
            [sys.executable, __file__, "--timed"], capture_output=True, text=True, check=False
        )
        return {
            "compiler": compiler,
            "children": count,
            "seconds": round(seconds, 1),
            "codes": codes,
            "kernels": kernels,
            "compiled_again": compiled - kernels,
            "least_free_gib": round(least.bytes / 2**30, 1),
            "us": json.loads(again.stdout) if again.returncode == 0 else again.stderr[-500:],
            "said": output[-1500:] if any(codes) else "",
        }


def timed() -> dict[str, float]:
    """Microseconds of a few large products, kernels from the cache, least of 5 means of 20."""
    found = {}
    for product in TIMED:
        times = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                prebuild.multiply_nothing(product, torch.device("cuda:0"))
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / 20)
        found[str(product)] = round(min(times[1:]), 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--children", default="4,8,12")
    parser.add_argument("--compilers", default="nvcc,nvrtc")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--timed", action="store_true", help="only time products, with this cache")
    options = parser.parse_args()
    if options.timed:
        del os.environ["DG_JIT_PRINT_COMPILER_COMMAND"]
        print(json.dumps(timed()))
        return 0
    products = prebuild.deep_gemm_products(*sizes())
    gib = prebuild.tensor_bytes(products) / 2**30
    print(f"{len(products)} products, a child's tensors take up to {gib:.2f} GiB", flush=True)
    rows = []
    for compiler in options.compilers.split(","):
        for count in map(int, options.children.split(",")):
            rows.append(run(products, count, compiler))
            print(json.dumps(rows[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
