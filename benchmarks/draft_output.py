"""Drafts with an output head in FP8: how many are accepted, and what its GEMM costs on a GPU.

    OMP_NUM_THREADS=1 python benchmarks/draft_output.py --out benchmarks/results/draft_output.json
    python benchmarks/draft_output.py --product  # needs a GPU, 5 GB of its memory, some seconds

Each shipped model answers with the exact head and with its FP8 copy: tasks that it was trained for,
and a continuation of random tokens, where its distributions are flat and drafts are often rejected.
Both must give the same text. The GEMM has the shapes of the 27B model, one row per token, in CUDA
graphs; neither head fits into the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import commit

from millrace import LLM, SamplingParams
from millrace.model.build_context import BuildContext
from millrace.model.parallel import TensorParallel
from millrace.model.vocabulary import Fp8DraftHead, OutputHead, VocabTable
from millrace.tasks import TASKS

MODELS = Path(__file__).resolve().parents[1] / "models"
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
HEADS = ("none", "fp8")
REPEATS = 20


# --- drafts ------------------------------------------------------------------------------------


def tasks(llm: LLM, count: int, temperature: float) -> list[str]:
    """Answers to `count` questions of each of two tasks."""
    items = [TASKS[task].make(i, 0, "heldout") for task in ("math", "chat") for i in range(count)]
    params = [
        SamplingParams(temperature=temperature, max_tokens=TASKS[item.task].max_tokens, seed=i)
        for i, item in enumerate(items)
    ]
    answers = llm.chat([list(item.messages) for item in items], params)
    return [answer.outputs[0].text for answer in answers]


def noise(llm: LLM, count: int, temperature: float) -> list[list[int]]:
    """Two times `count` continuations of random tokens, of 100 tokens each."""
    rng = random.Random(3)
    prompts = [
        {"prompt_token_ids": [rng.randrange(3, 4000) for _ in range(rng.randint(4, 60))]}
        for _ in range(2 * count)
    ]
    params = SamplingParams(temperature=temperature, max_tokens=100, ignore_eos=True, seed=5)
    return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params)]


def acceptance(model: str, k: int, temperature: float, ask: Any, args: Any) -> dict[str, Any]:
    """One line of the table: rows of drafts and the share that stood, by position, either head."""
    line: dict[str, Any] = {
        "model": model, "ask": ask.__name__, "drafts": k, "temperature": temperature,
    }  # fmt: skip
    said = []
    for head in HEADS:
        speculative = {"num_speculative_tokens": k, "quantization": head}
        with LLM(
            str(MODELS / model), device=args.device, dtype=args.dtype, max_model_len=1024,
            max_num_seqs=32, gpu_memory_utilization=0.3, speculative_config=speculative,
        ) as llm:  # fmt: skip
            said.append(ask(llm, args.count, temperature))
            stats = llm.stats()
        rates = [round(n / stats.drafts, 4) for n in stats.accepted_per_position]
        line[head] = {"rows": stats.drafts, "stood": rates}
    line["same"] = f"{sum(a == b for a, b in zip(*said, strict=True))} of {len(said[0])}"
    print(json.dumps(line), flush=True)
    return line


# --- the product -------------------------------------------------------------------------------


def graph_ms(head: OutputHead, rows: int) -> float:
    """Milliseconds of its logits of so many rows."""
    hidden = torch.randn(rows, 5120, device="cuda", dtype=torch.bfloat16)
    head.logits(hidden)  # compiles
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        head.logits(hidden)
    for _ in range(REPEATS):
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


@torch.inference_mode()
def product() -> list[dict[str, Any]]:
    shape: Any = SimpleNamespace(vocab_size=248320, hidden_size=5120)
    cuda = torch.device("cuda")
    build = BuildContext(shape, TensorParallel(), torch.bfloat16, cuda, keep_quantized=True)
    table = VocabTable(build, "lm_head.weight")
    table.weight.data.normal_(0, 5120**-0.5)
    rounded = Fp8DraftHead(table)
    torch.cuda.synchronize()
    began = time.perf_counter()
    rounded.quantize()
    torch.cuda.synchronize()
    lines: list[dict[str, Any]] = [{"made_ms": round(1e3 * (time.perf_counter() - began), 1)}]
    for rows in ROWS:
        hidden = torch.randn(rows, 5120, device="cuda", dtype=torch.bfloat16)
        exact, found = (head.logits(hidden).float() for head in (table, rounded))
        error = float((found - exact).norm() / exact.norm())
        times = [round(graph_ms(head, rows), 4) for head in (table, rounded)]
        lines.append({"rows": rows, "bf16_ms": times[0], "fp8_ms": times[1], "error": error})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--product", action="store_true", help="measure the product, on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--count", type=int, default=32, help="questions of a task")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"commit": commit(), "device": args.device, "dtype": args.dtype}
    if args.product:
        found |= {"device": torch.cuda.get_device_name(), "product": product()}
    else:
        found["acceptance"] = [
            acceptance(model, k, temperature, ask, args)
            for model in ("millrace-mini", "millrace-mini-fp8")
            for k in (1, 3)
            for temperature in (0.0, 1.0)
            for ask in (tasks, noise)
        ]
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
