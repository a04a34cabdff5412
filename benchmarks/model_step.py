"""The cost of a forward of the model on this CPU: a decoding step, a long prompt, the draft head.

    python -m benchmarks.model_step --threads 2 --dtype bfloat16 [--profile]

Runs the model alone, without scheduler, sampling or server, on the tiny checkpoint with random
weights. Rows start at different fill levels, so that each step folds some windows, as in traffic.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from torch.profiler import ProfilerActivity, profile

from millrace.kernels.batch import GDNState
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.tiny import write_checkpoint
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches, make_batch

ROWS, PROMPT, STEPS, WINDOW = 32, 128, 48, 16


def decode_driver(model: CausalLM, drafts: int) -> Driver:
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


def decode(model: CausalLM, drafts: int, shuffled: bool) -> list[float]:
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


def prefill(model: CausalLM, rows: int, tokens: int, ends: bool = False) -> list[float]:
    """Milliseconds of one step over `rows` prompts of `tokens` each.

    ends: only the hidden of each prompt's last token is asked for, as the engine does.
    """
    driver = Driver(model, allocate_caches(model, rows, tokens // 16 + 2, page_size=16))
    times = []
    for _ in range(5):
        for slot in range(1, rows + 1):
            driver.admit(slot)
        start = time.perf_counter()
        driver.step(prefill=[(slot, [7] * tokens) for slot in range(1, rows + 1)], ends=ends)
        times.append(1e3 * (time.perf_counter() - start))
    return times


@torch.inference_mode()
def draft_head(model: CausalLM, rows: int, tokens: int) -> tuple[list[float], list[float]]:
    """Milliseconds of the draft head over `rows` rows of `tokens` each, in turn: through its layer
    at all of them, and at each row's last.
    """
    caches = allocate_caches(model, rows, (PROMPT + tokens) // 16 + 2, page_size=16)
    starts = torch.full((rows + 1,), 1 if tokens > PROMPT else PROMPT)
    for pages in (caches.mtp.keys, caches.mtp.values):
        pages.zero_()
    steps = [(slot, [7] * tokens) for slot in range(1, rows + 1)]
    kinds = ([], steps) if tokens > PROMPT else (steps, [])
    ids, batch = make_batch(caches, starts, *kinds)
    hidden = torch.randn(len(ids), model.config.hidden_size, dtype=next(model.parameters()).dtype)
    last = torch.arange(1, rows + 1) * tokens - 1
    ends = [(slot, [7]) for slot in range(1, rows + 1)]
    _, singles = make_batch(caches, starts + tokens - 1, ends, [])

    def whole() -> None:
        model.mtp(ids, hidden, batch, caches)

    def at_the_last() -> None:
        x = model.mtp.write_kv(ids, hidden, batch, caches)
        model.mtp.draft_hidden(x[last], singles, caches)

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(STEPS):
        for run, found in zip((whole, at_the_last), times, strict=True):
            start = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - start))
    return times


def report(name: str, times: list[float]) -> None:
    print(f"{name:46} median {statistics.median(times):8.2f} ms   least {min(times):8.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--profile", action="store_true", help="also list the costliest operations")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(directory)
        dtype = getattr(torch, options.dtype)
        model = build_model(read_config(directory), dtype=dtype, mtp=True)
        load(model, directory)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.dtype}")
    for drafts in (0, 1):
        report(f"decode step, {ROWS} rows, k = {drafts}", decode(model, drafts, shuffled=False))
    report(f"decode step, {ROWS} rows in any order, k = 0", decode(model, 0, shuffled=True))
    report("prefill, 16 prompts of 128", prefill(model, 16, 128))
    report("prefill, 1 prompt of 2048", prefill(model, 1, 2048))
    report("prefill, 1 prompt of 2048, its end asked for", prefill(model, 1, 2048, ends=True))
    for rows, tokens in ((1, 2048), (ROWS, 2), (1, 2)):
        whole, at_the_last = draft_head(model, rows, tokens)
        report(f"draft head, {rows} x {tokens} tokens, whole", whole)
        report(f"draft head, {rows} x {tokens} tokens, at the last", at_the_last)
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            decode(model, 0, shuffled=False)
        print(measured.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
