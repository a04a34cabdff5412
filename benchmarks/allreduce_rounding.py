"""The accuracy cost of bfloat16 all-reduces that round once or twice: millrace-mini on a CPU.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/allreduce_rounding.py

The all-reduce computes as the GPU kernel does (`kernels/gpu/all_reduce.py`): partial sums in
bfloat16, added in float32. "Once": rounded after the residual. "Twice": after the sum as well.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from millrace.kernels.norm import rms_norm
from millrace.replica import rank_launcher
from millrace.runtime.ranks.allreduce import AllReduce

SUMS = "RANKS_ROUNDING_SUMS"  # "once" or "twice", for a rank that this script starts
PROMPTS = [[(7 * i * (k + 3) + k) % 250 for i in range(40 + 31 * k)] for k in range(8)]
RUNS: dict[str, dict[str, Any]] = {
    "one rank, float32": {"dtype": "float32"},
    "one rank": {"dtype": "bfloat16"},
    "one rank, chunks of 32": {
        "dtype": "bfloat16",
        "max_num_batched_tokens": 32,
        "max_num_seqs": 4,
    },
    "two ranks, twice": {"dtype": "bfloat16", "tensor_parallel_size": 2},
    "two ranks, once": {"dtype": "bfloat16", "tensor_parallel_size": 2},
}


def add_up(how: str) -> None:
    """Have this process's sums rounded as said."""

    def all_reduce_norm(
        self: AllReduce, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *_: bool
    ) -> Any:
        total = torch.stack(self.ranks.all_gather_parts(x)).float().sum(0)
        if how == "twice":
            total = total.to(x.dtype).float()
        stream = (total + residual.float()).to(x.dtype)
        return rms_norm(stream, weight, eps), None, stream

    AllReduce.all_reduce_norm = all_reduce_norm  # type: ignore[method-assign]


def start_rank(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    at = command.index("millrace.replica.process") + 1
    return subprocess.Popen([sys.executable, __file__, "rank", *command[at:]], env=env)


def logprobs(name: str) -> list[float]:
    """Of the prompts' tokens, by one arrangement."""
    from millrace import LLM, SamplingParams

    how = name.rpartition(" ")[2]
    if "tensor_parallel_size" in RUNS[name]:
        os.environ[SUMS] = how
        add_up(how)
    options = {"device": "cpu", "max_model_len": 512, "max_num_seqs": 8, **RUNS[name]}
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    with LLM("models/millrace-mini", kv_cache_memory_bytes=1 << 28, **options) as llm:
        found = []
        for out in llm.generate(PROMPTS, params, use_tqdm=False):
            rows = zip(out.prompt_token_ids, out.prompt_logprobs or [], strict=True)
            found += [row[token].logprob for token, row in rows if row is not None]
    return found


def main() -> int:
    if sys.argv[1:2] == ["rank"]:
        from millrace.replica.process import main as be_a_rank

        add_up(os.environ[SUMS])
        del sys.argv[1]
        return be_a_rank()
    stand_in = SimpleNamespace(Popen=start_rank, TimeoutExpired=subprocess.TimeoutExpired)
    rank_launcher.subprocess = stand_in  # type: ignore[assignment]
    found = {name: logprobs(name) for name in RUNS}
    exact, alone = found["one rank, float32"], found["one rank"]
    print("median difference of log-probabilities from: one rank in float32, in bfloat16")
    for name, values in found.items():
        apart = [
            statistics.median(abs(a - b) for a, b in zip(values, other, strict=True))
            for other in (exact, alone)
        ]
        print(f"{name:>24} {apart[0]:.4f} {apart[1]:.4f}")
    print(json.dumps({"tokens": len(exact)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
