"""Several GPUs of one host: are the ranks right, what do their sums cost, what do they bring.

    python benchmarks/tp_h200.py --gpus 2 --phases sums,correctness,shapes,parallelism
    python benchmarks/tp_h200.py --gpus 4 --phases sums,shapes,dp
    python benchmarks/tp_h200.py --gpus 4 --phases correctness,parallelism
    python benchmarks/tp_h200.py --dry-run          # every phase, small, on any machine

Phases, each in processes of its own with a limit of time; what is found is merged into --out phase
by phase, so a call that is cut short keeps what it has:

  sums         every all-reduce at 4 KiB .. 4 MiB: raw, in a CUDA graph, with the norm; and NCCL
               between graphs
  correctness  log-probabilities and greedy tokens of TP against one GPU, beside one GPU's noise
  shapes       27B-FP8 shapes on seeded random weights, one draft accepted at 0.9: steady decoding
               at batch 1, 8, 32 and 256 for TP = 1, 2 (and 4)
  dp           as many engines as GPUs at once, against one alone: efficiency
  parallelism  `millrace bench parallelism millrace-mini`: the table with accuracy

NVLink multicast stays off throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
for name, value in {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}.items():
    os.environ[name] = value

import torch  # noqa: E402
from qwen27b import write_config  # noqa: E402

from millrace.config import engine_args  # noqa: E402
from millrace.model.tiny import TinyShape, write_checkpoint  # noqa: E402

PHASES = ("sums", "correctness", "shapes", "dp", "parallelism")
LIMITS = {"sums": 120, "correctness": 240, "shapes": 240, "dp": 240, "parallelism": 420}  # seconds
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
# Heads for four ranks, and an MLP of five FP8 blocks, which no number of ranks divides.
WIDE = TinyShape(num_heads=8, num_kv_heads=4, key_heads=4, value_heads=8)


# --- children: each prints one line of JSON ----------------------------------------------------


def child_sums(options: argparse.Namespace) -> Any:
    """One rank of the table. Rank 0 starts the others and returns the figures."""
    from millrace.runtime.collectives import Collectives
    from millrace.runtime.ranks import Place, Ranks, launched_by_torchrun, open_store, place

    cuda, others, store = not options.dry_run, [], None
    if launched_by_torchrun():
        mine = place(options.ranks)
    else:
        mine, store = Place(0, options.ranks, 0), open_store()
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        for rank in range(1, options.ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks)}
            command = [sys.executable, *sys.argv]
            env = {**os.environ, **shared, **own}
            others.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL))
    if cuda:
        torch.cuda.set_device(mine.local)
    device = torch.device("cuda" if cuda else "cpu")
    end = None if mine.rank == 0 else lambda why: os._exit(3)
    ranks = Ranks.join(mine, "nccl" if cuda else "gloo", {}, store=store, on_failure=end)
    dtype = torch.bfloat16 if cuda else torch.float32
    rows = [2**n for n in range(11)] if cuda else [1, 8]
    sums = Collectives.build(ranks, SUM_WIDTH, dtype, device)
    found = {"table": [asdict(timing) for timing in sums.measure(rows)]}
    if cuda:
        found["between_graphs"] = between_graphs(ranks, rows)
    ranks.leave()
    for other in others:
        other.wait(30)
    return found


def between_graphs(ranks: Any, rows: list[int]) -> list[dict[str, float]]:
    """NCCL called by the host between graphs of one small kernel, and both in one graph: us."""
    found = []
    for count in rows:
        x = torch.zeros(count, SUM_WIDTH, dtype=torch.bfloat16, device="cuda")
        piece, whole = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        ranks.all_reduce(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(piece, capture_error_mode="thread_local"):
            x.mul_(0.5)
        with torch.cuda.graph(whole, capture_error_mode="thread_local"):
            for _ in range(20):
                ranks.all_reduce(x.mul_(0.5))

        def apart(piece: Any = piece, x: Any = x) -> None:
            for _ in range(20):
                piece.replay()
                ranks.all_reduce(x)

        figures = ranks.largest([event_us(apart) / 20, event_us(whole.replay) / 20])
        found.append({"bytes": x.nbytes, "between_us": figures[0], "in_graph_us": figures[1]})
    return found


def event_us(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def child_outputs(options: argparse.Namespace) -> Any:
    """Log-probabilities of given prompts, and greedy continuations, of one arrangement."""
    from millrace import LLM, SamplingParams

    prompts = [[(7 * i * (k + 3) + k) % 250 for i in range(40 + 31 * k)] for k in range(8)]
    asked = {"tensor_parallel_size": options.ranks, "max_model_len": 512, "max_num_seqs": 8}
    if options.chunk:
        asked |= {"max_num_batched_tokens": options.chunk, "max_num_seqs": 4}
    if options.dry_run:
        asked |= {"device": "cpu", "kv_cache_memory_bytes": 1 << 27}
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, prompt_logprobs=0)
    with LLM(options.model, **asked) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        logprobs = []
        for out in outputs:
            rows = out.prompt_logprobs or []
            pairs = zip(out.prompt_token_ids, rows, strict=True)
            logprobs += [row[token].logprob for token, row in pairs if row is not None]
        return {"logprobs": logprobs, "tokens": [out.outputs[0].token_ids for out in outputs]}


def child_shapes(options: argparse.Namespace) -> Any:
    """Steady decoding of the 27B shapes at each batch size."""
    from millrace.engine.replica import build_engine

    began = time.perf_counter()
    args = TINY if options.dry_run else FULL
    engine = build_engine(
        engine_args(model=options.model, tensor_parallel_size=options.ranks, **args)
    )
    found: dict[str, Any] = {"tp": options.ranks, "start_s": time.perf_counter() - began}
    sums = engine.worker.collectives
    found["sums"] = [asdict(timing) for timing in sums.timings]
    batches = [int(n) for n in options.batches.split(",")]
    found["batches"] = {str(n): steady(engine, n, options.dry_run) for n in batches}
    if options.ranks > 1:
        from millrace.runtime.collectives import budget

        count = budget(engine.worker.model_config, 1)
        for n in batches:
            row = found["batches"][str(n)]
            row["sums_per_step"], row["sum_us"] = count, sums.cost_us(2 * n)
            row["sums_share"] = count * row["sum_us"] / 1e3 / row["step_ms"]
    engine.close()
    return found


def steady(engine: Any, rows: int, tiny: bool) -> dict[str, float]:
    """Milliseconds a step and output tokens a second with `rows` requests decoding all along."""
    from engine_runs import requests, synchronize

    length, steps, repeats = (16, 6, 2) if tiny else (512, 24, 3)
    todo = list(requests(rows, 77, (length, length), (220, 220), 2000 if tiny else 248_000))
    for request in todo:
        engine.add(request)
    while engine.stats().waiting or engine.stats().running < rows:
        engine.step()
    for _ in range(4 if tiny else 12):
        engine.step()
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
    engine.abort([request.id for request in todo])
    while engine.has_work():
        engine.step()
    return {"step_ms": statistics.median(times), "output_tok_s": statistics.median(rates)}


# --- phases ------------------------------------------------------------------------------------


def start(kind: str, options: argparse.Namespace, gpus: str | None = None, **given: Any) -> Any:
    command = [sys.executable, __file__, "--child", kind]
    for key, value in given.items():
        command += [f"--{key}", str(value)]
    command += ["--dry-run"] if options.dry_run else []
    env = dict(os.environ) | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})
    if options.dry_run:
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def result(process: Any, limit: float) -> Any:
    """What a child found; an error by what it was."""
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()  # its ranks end with it
        process.communicate()
        return {"error": f"took longer than {limit:.0f} s"}
    if process.returncode:
        return {"error": f"ended with status {process.returncode}"}
    return json.loads(out.strip().splitlines()[-1])


def phase_sums(options: argparse.Namespace, models: dict[str, str]) -> Any:
    found = result(start("sums", options, ranks=options.gpus), LIMITS["sums"])
    if "table" in found:
        from millrace.runtime.collectives import Timing, table

        print(table([Timing(**row) for row in found["table"]]), flush=True)
    return found


def phase_correctness(options: argparse.Namespace, models: dict[str, str]) -> Any:
    """TP against one GPU; noise: one GPU against itself, with prompts in chunks."""
    found: dict[str, Any] = {}
    for name in ("mini", "wide", "wide-fp8"):
        ranks = 2 if name == "mini" else options.gpus
        runs = [
            start("outputs", options, gpus, model=models[name], **given)
            for gpus, given in (("0", {"ranks": 1}), ("1", {"ranks": 1, "chunk": 32}))
        ]
        alone, chunked = (result(run, LIMITS["correctness"] / 3) for run in runs)
        run = start("outputs", options, model=models[name], ranks=ranks)
        together = result(run, LIMITS["correctness"] / 3)
        errors = [r["error"] for r in (alone, chunked, together) if "error" in r]
        found[name] = {"ranks": ranks} | (
            {"error": errors[0]}
            if errors
            else {"tp": difference(alone, together), "noise": difference(alone, chunked)}
        )
        print(name, json.dumps(found[name]), flush=True)
    return found


def difference(a: Any, b: Any) -> dict[str, float]:
    apart = [abs(x - y) for x, y in zip(a["logprobs"], b["logprobs"], strict=True)]
    same = [x == y for x, y in zip(a["tokens"], b["tokens"], strict=True)]
    return {
        "median_logprob": statistics.median(apart),
        "p99_logprob": sorted(apart)[int(0.99 * len(apart))],
        "max_logprob": max(apart),
        "equal_outputs": sum(same) / len(same),
    }


def phase_shapes(options: argparse.Namespace, models: dict[str, str]) -> Any:
    found: dict[str, Any] = {}
    for ranks in [n for n in (1, 2, 4) if n <= options.gpus]:
        gpus = ",".join(map(str, range(ranks)))
        run = start("shapes", options, gpus, ranks=ranks, model=models["27b"],
                    batches=options.batches)  # fmt: skip
        found[str(ranks)] = result(run, LIMITS["shapes"])
        print(f"TP={ranks}", json.dumps(found[str(ranks)].get("batches")), flush=True)
    base = found["1"].get("batches", {})
    for ranks, record in found.items():
        for batch, row in record.get("batches", {}).items():
            if batch in base:
                row["speedup"] = row["output_tok_s"] / base[batch]["output_tok_s"]
                print(f"TP={ranks} batch {batch}: {row['speedup']:.2f} times TP=1")
    return found


def phase_dp(options: argparse.Namespace, models: dict[str, str]) -> Any:
    """The largest batch on one GPU alone, then on every GPU at once."""
    given = {"ranks": 1, "model": models["27b"], "batches": options.batches.split(",")[-1]}

    def rates(gpus: list[str]) -> list[float]:
        runs = [start("shapes", options, gpu, **given) for gpu in gpus]
        ends = [result(run, LIMITS["dp"]) for run in runs]
        return [row["output_tok_s"] for end in ends for row in end.get("batches", {}).values()]

    alone, all_at_once = rates(["0"]), rates([str(n) for n in range(options.gpus)])
    if not alone or len(all_at_once) < options.gpus:
        return {"error": "an engine did not come up", "alone": alone, "each": all_at_once}
    efficiency = sum(all_at_once) / (options.gpus * alone[0])
    print(f"DP={options.gpus}: {efficiency:.1%} of {options.gpus} times one", flush=True)
    return {"alone": alone[0], "each": all_at_once, "efficiency": efficiency}


def phase_parallelism(options: argparse.Namespace, models: dict[str, str]) -> Any:
    arrangements = "1x1,1x2,2x1" if options.gpus == 2 else f"1x1,1x{options.gpus},2x2"
    load = ["--num-prompts", "12" if options.dry_run else "512", "--max-concurrency",
            "4" if options.dry_run else "128", "--num-warmups", "2"]  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "millrace.cli", "bench", "parallelism", models["mini"]]
        command += ["--arrangements", arrangements, *load, "--random-output-len", "32"]
        command += ["--accuracy-items", "10" if options.dry_run else "100"]
        command += ["--result-dir", directory, "--result-filename", "p.json"]
        command += ["--", "--max-model-len", "1024"]
        command += ["--device", "cpu", "--max-num-seqs", "8"] if options.dry_run else []
        try:
            done = subprocess.run(command, timeout=LIMITS["parallelism"], check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {LIMITS['parallelism']} s"}
        file = Path(directory, "p.json")
        if not file.exists():
            return {"error": f"ended with status {done.returncode}"}
        report: dict[str, Any] = json.loads(file.read_text())
        return report["table"]


# --- everything --------------------------------------------------------------------------------


def make_models(parent: Path, dry_run: bool) -> dict[str, str]:
    shipped = "models/millrace-mini"
    found = {"mini": str(ROOT / shipped)}
    for name, fp8 in (("wide", False), ("wide-fp8", True)):
        shape = TinyShape(**{**asdict(WIDE), "fp8": fp8})
        found[name] = str(write_checkpoint(parent / name, shape, seed=5))
    small = found["wide-fp8"]
    found["27b"] = small if dry_run else str(write_config(parent / "qwen27b"))
    return found


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--child", choices=("sums", "outputs", "shapes"), help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batches")
    options = parser.parse_args()
    options.batches = options.batches or ("1,2" if options.dry_run else "1,8,32,256")
    unknown = [name for name in options.phases.split(",") if name not in PHASES]
    if unknown:
        parser.error(f"--phases: no {unknown[0]!r}; there are {', '.join(PHASES)}")
    return options


def main() -> None:
    options = parse_options()
    children = {"sums": child_sums, "outputs": child_outputs, "shapes": child_shapes}
    if options.child:
        print(json.dumps(children[options.child](options)), flush=True)
        return
    name = "tp_dry_run.json" if options.dry_run else f"tp_h200_x{options.gpus}.json"
    place = Path(tempfile.gettempdir()) if options.dry_run else ROOT / "benchmarks/results"
    path = options.out or place / name
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    device = "cpu" if options.dry_run else torch.cuda.get_device_name()
    out = json.loads(path.read_text()) if path.exists() else {}
    out |= {"commit": commit, "device": device, "gpus": options.gpus, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as parent:
        models = make_models(Path(parent), options.dry_run)
        for phase in options.phases.split(","):
            began = time.perf_counter()
            print(f"-- {phase}", flush=True)
            out[phase] = globals()[f"phase_{phase}"](options, models)
            print(f"-- {phase}: {time.perf_counter() - began:.0f} s", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(out, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
