"""What a forward of the model costs on this CPU: a decode step, and a long prompt.

    python -m benchmarks.model_step --threads 2 --dtype bfloat16 [--profile]

Runs the model alone, without scheduler, sampling or server, on the tiny checkpoint with random
weights. Rows start at different fills, so that each step folds some windows, as in real traffic.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from torch.profiler import ProfilerActivity, profile

from millrace.kernels.batch import GDNState
from millrace.model.config import read_config
from millrace.model.qwen3_5 import Qwen3_5, build_model
from millrace.model.tiny import write_checkpoint
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches, make_batch

ROWS, PROMPT, STEPS, WINDOW = 32, 128, 48, 16


def decode_driver(model: Qwen3_5, drafts: int) -> Driver:
    """32 sequences of 128 tokens, their windows filled to different heights."""
    driver = Driver(model, allocate_caches(model, ROWS, 20, page_size=16, drafts=drafts))
    for slot in range(1, ROWS + 1):
        driver.admit(slot)
        driver.step(prefill=[(slot, [(7 * slot + i) % 2000 for i in range(PROMPT)])])
        driver.caches.fill[slot] = slot % WINDOW
    for layer in driver.caches.layers:
        if isinstance(layer, GDNState):
            for window in (layer.window_k, layer.window_u, layer.window_g):
                window.zero_()
    return driver


def decode(model: Qwen3_5, drafts: int, shuffled: bool) -> list[float]:
    """Milliseconds of each decode step, logits included."""
    driver, width, times = decode_driver(model, drafts), drafts + 1, []
    order = list(range(1, ROWS + 1))
    if shuffled:
        order = order[::2] + order[1::2]
    for _ in range(STEPS):
        ids, batch = make_batch(
            driver.caches, driver.lengths, [(slot, [5] * width) for slot in order], []
        )
        start = time.perf_counter()
        with torch.inference_mode():
            model.logits(model(ids, batch, driver.caches))
        times.append(1e3 * (time.perf_counter() - start))
        for slot in order:
            driver.accept(slot, 1 + slot % width, width)
    return times


def prefill(model: Qwen3_5, rows: int, tokens: int) -> list[float]:
    """Milliseconds of one step over `rows` prompts of `tokens` each."""
    driver = Driver(model, allocate_caches(model, rows, tokens // 16 + 2, page_size=16))
    times = []
    for _ in range(5):
        for slot in range(1, rows + 1):
            driver.admit(slot)
        start = time.perf_counter()
        driver.step(prefill=[(slot, [7] * tokens) for slot in range(1, rows + 1)])
        times.append(1e3 * (time.perf_counter() - start))
    return times


def report(name: str, times: list[float]) -> None:
    print(f"{name:42} median {statistics.median(times):8.1f} ms   least {min(times):8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--profile", action="store_true", help="also list the costliest operations")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(directory)
        model = build_model(read_config(directory), dtype=getattr(torch, options.dtype))
        load(model, directory)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.dtype}")
    for drafts in (0, 1):
        report(f"decode step, {ROWS} rows, k = {drafts}", decode(model, drafts, shuffled=False))
    report(f"decode step, {ROWS} rows in any order, k = 0", decode(model, 0, shuffled=True))
    report("prefill, 16 prompts of 128", prefill(model, 16, 128))
    report("prefill, 1 prompt of 2048", prefill(model, 1, 2048))
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            decode(model, 0, shuffled=False)
        print(measured.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
