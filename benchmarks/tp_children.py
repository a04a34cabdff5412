"""The processes that `tp_h200.py` starts: each measures one thing and writes its results.

    python benchmarks/tp_children.py sums --ranks 2 --result FILE
    python benchmarks/tp_children.py outputs --ranks 2 --model DIR --result FILE
    python benchmarks/tp_children.py shapes --ranks 2 --model DIR --batches 1,8 --result FILE

FILE holds the results so far at any time, so that a process that is ended early loses little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

import torch  # noqa: E402

from millrace.config import engine_args  # noqa: E402

SUM_WIDTH = 2048  # of the messages of the table: 4 KiB a token
SPEC = {"num_speculative_tokens": 1, "synthetic_acceptance": 0.9}
FULL: dict[str, Any] = {
    "load_format": "dummy",
    "kv_cache_dtype": "fp8_e4m3",
    "max_model_len": 2560,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
    "block_size": 64,
    "speculative_config": SPEC,
}
TINY: dict[str, Any] = {
    "load_format": "dummy",
    "device": "cpu",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 27,
    "enable_prefix_caching": False,
    "speculative_config": SPEC,
}


class Result:
    """What has been found so far, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.found: dict[str, Any] = {}
        self._path = path

    def note(self, **found: Any) -> None:
        self.found |= found
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.found))
        part.replace(self._path)


# --- sums --------------------------------------------------------------------------------------


def sums(options: argparse.Namespace, result: Result) -> None:
    """One rank of the table of sums. Rank 0 starts the others and keeps the figures."""
    from millrace.runtime.ranks.allreduce import AllReduce
    from millrace.runtime.ranks.process_groups import (
        RankInfo,
        launched_by_torchrun,
        open_store,
        torchrun_rank_info,
    )
    from millrace.runtime.ranks.ranks import Ranks

    cuda, others, store = not options.dry_run, [], None
    if launched_by_torchrun():
        mine = torchrun_rank_info(options.ranks)
    else:
        mine, store = RankInfo(0, options.ranks, 0), open_store()
        others = [_other_rank(rank, options.ranks, store.port) for rank in range(1, options.ranks)]
    if cuda:
        torch.cuda.set_device(mine.local)
    device = torch.device("cuda" if cuda else "cpu")
    end = None if mine.rank == 0 else lambda why: os._exit(3)
    ranks = Ranks.join(mine, "nccl" if cuda else "gloo", {}, store=store, on_failure=end)
    dtype = torch.bfloat16 if cuda else torch.float32
    ways = AllReduce.build(ranks, SUM_WIDTH, dtype, device)
    table: list[Any] = []
    for rows in [2**n for n in range(11)] if cuda else [1, 8]:
        table += [asdict(timing) for timing in ways.measure([rows])]
        if mine.rank == 0:
            result.note(table=table)
    ranks.leave()
    for other in others:
        other.wait(30)


def _other_rank(rank: int, size: int, port: int) -> Any:
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **env})


# --- outputs -----------------------------------------------------------------------------------


def outputs(options: argparse.Namespace, result: Result) -> None:
    """Log-probabilities of given prompts, and greedy continuations, of one arrangement."""
    from millrace import LLM, SamplingParams

    prompts = [[(7 * i * (k + 3) + k) % 250 for i in range(40 + 31 * k)] for k in range(8)]
    asked = {"tensor_parallel_size": options.ranks, "max_model_len": 512, "max_num_seqs": 8}
    asked |= {"kv_cache_memory_bytes": 1 << (27 if options.dry_run else 30)}
    if options.chunk:
        asked |= {"max_num_batched_tokens": options.chunk, "max_num_seqs": 4}
    if options.dry_run:
        asked |= {"device": "cpu"}
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, prompt_logprobs=0)
    with LLM(options.model, **asked) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        logprobs = []
        for out in outputs:
            rows = out.prompt_logprobs or []
            pairs = zip(out.prompt_token_ids, rows, strict=True)
            logprobs += [row[token].logprob for token, row in pairs if row is not None]
        result.note(logprobs=logprobs, tokens=[out.outputs[0].token_ids for out in outputs])


# --- shapes ------------------------------------------------------------------------------------


def shapes(options: argparse.Namespace, result: Result) -> None:
    """Steady decoding of the 27B shapes at each batch size, and what its sums take of a step."""
    from millrace.replica.build import build_engine
    from millrace.runtime.ranks.allreduce import calls_per_step

    began = time.perf_counter()
    args = {**(TINY if options.dry_run else FULL), "tensor_parallel_size": options.ranks}
    engine = build_engine(engine_args(model=options.model, **args))
    ways = engine.worker.all_reduce
    timings = [asdict(timing) for timing in ways.timings]
    result.note(tp=options.ranks, start_s=time.perf_counter() - began, sums=timings, batches={})
    for rows in [int(n) for n in options.batches.split(",")]:
        row: dict[str, Any] = steady(engine, rows, options.dry_run)
        if options.ranks > 1:
            count, cost = calls_per_step(engine.worker.model_config, 1), ways.cost_us(2 * rows)
            share = count * cost / 1e3 / row["step_ms"]
            row |= {"sums_per_step": count, "sum_us": cost, "sums_share": share}
        result.note(batches=result.found["batches"] | {str(rows): row})
    engine.close()


def steady(engine: Any, rows: int, tiny: bool) -> dict[str, float]:
    """Milliseconds a step and output tokens a second with `rows` requests decoding all along."""
    from engine_runs import abort_all, all_decoding, synchronize

    length, steps, repeats = (16, 6, 2) if tiny else (256, 16, 3)
    vocab = 2000 if tiny else 248_000
    todo = all_decoding(engine, rows, vocab, length, repeats * steps + 2, 77)
    rates, times = [], []
    for _ in range(repeats):
        synchronize()
        began, tokens = time.perf_counter(), 0
        for _ in range(steps):
            tokens += sum(len(delta.token_ids) for delta in engine.step())
        synchronize()
        spent = time.perf_counter() - began
        rates.append(tokens / spent)
        times.append(spent / steps * 1e3)
    abort_all(engine, todo)
    return {"step_ms": statistics.median(times), "output_tok_s": statistics.median(rates)}


def main() -> None:
    kinds = {"sums": sums, "outputs": outputs, "shapes": shapes}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--model")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--batches", default="1,8,32,256")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    kinds[options.kind](options, Result(options.result))


if __name__ == "__main__":
    main()
