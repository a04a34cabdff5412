"""The work that steps are billed for, beside what is counted while they run.

    python -m benchmarks.work_counted                     # CPU: torch's FLOP counter
    python -m benchmarks.work_counted --gpu               # one GPU: its own counters, 27B shapes
    python -m benchmarks.work_counted --gpu --model qwen3.5-35b-a3b

On a CPU the references of all ops run, whose products torch counts; small models of every kind
prefill and decode. On a GPU a few layers of published shapes run one step of 128 decode rows and
one of a prompt of 2,048 tokens, under `ncu`: FLOPs of the tensor pipes and of FP32 instructions,
bytes of DRAM. Without `ncu`, where it may read no counters, or where a step takes too long, the
object says why. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

GEMMS = ("linear", "experts", "draft_layer", "draft_model", "heads")


# --- on a CPU ----------------------------------------------------------------------------------


def cpu_kinds() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> (config.json, options of the engine)."""
    from millrace.model.tiny import QWEN3, QWEN3_MOE, TinyShape, config_json, moe_config_json

    shape = TinyShape(
        hidden_size=256, intermediate_size=640, num_layers=4, num_heads=4, num_kv_heads=2,
        head_dim=64, key_dim=64, value_dim=64, vocab_size=1024, dtype="float32",
    )  # fmt: skip
    width = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "vocab_size": 1024}
    drafts = {"num_speculative_tokens": 2}
    return {
        "hybrid": (config_json(shape), {}),
        "hybrid, 2 drafts": (config_json(shape), {"speculative_config": drafts}),
        "hybrid with experts, 2 drafts": (
            moe_config_json(shape), {"speculative_config": drafts},
        ),
        "attention, 4 looked up": (
            {**QWEN3, **width},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}},
        ),
        "attention with experts": ({**QWEN3_MOE, **width, "moe_intermediate_size": 128}, {}),
    }  # fmt: skip


def counted_on_cpu(directory: Path, config: dict[str, Any], options: dict[str, Any]) -> Any:
    """FLOPs of a run: as the account bills them, and as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from millrace.config import engine_args
    from millrace.model.tiny import write_checkpoint
    from millrace.protocol import AddRequest, SamplingParams
    from millrace.replica.build import build_engine

    torch.set_num_threads(1)
    model = write_checkpoint(directory, config, seed=1)
    engine = build_engine(
        engine_args(
            model=str(model), device="cpu", dtype="float32", max_num_seqs=4, max_model_len=512,
            enable_prefix_caching=False, max_num_batched_tokens=128, **options,
        )
    )  # fmt: skip
    assert engine.account is not None
    for number, length in enumerate((256, 128, 64, 40)):
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        prompt = [(7 * number + 3 * at) % 1000 for at in range(length)]
        engine.add(AddRequest(str(number), prompt, params))
    counter = FlopCounterMode(display=False)
    with counter:
        while engine.has_work():
            engine.step()
    parts = engine.account.totals().parts
    engine.close()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    gemms = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm"))
    return {
        "billed": {name: part.flops for name, part in parts.items() if part.flops},
        "counted": counted,
        "ratio": sum(p.flops for p in parts.values()) / sum(counted.values()),
        "ratio_gemms": sum(parts[n].flops for n in GEMMS if n in parts) / max(gemms, 1),
    }


def on_cpu(kinds: list[str] | None = None) -> dict[str, Any]:
    """Billed and counted work by kind of model; kinds: None for all."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (config, options)) in enumerate(cpu_kinds().items()):
            if kinds and name not in kinds:
                continue
            found[name] = counted_on_cpu(Path(folder) / str(number), config, options)
    return found


# --- on a GPU ----------------------------------------------------------------------------------

ROWS, CONTEXT, PROMPT = 128, 700, 2048
CACHE_BYTES = 4 << 30  # ncu copies what a kernel may write, for each pass of each kernel
BYTES = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
TENSOR = "sm__ops_path_tensor_src_"
FP32 = {
    "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum": 2,
    "smsp__sass_thread_inst_executed_op_fadd_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_fmul_pred_on.sum": 1,
}
COUNTED = ("fp8", "bf16", "fp16", "tf32")  # dtypes of sources; each takes a pass of every kernel


def say(what: str) -> None:
    """For whoever reads a run that was cut short: how far it came."""
    seconds = time.time() - psutil.Process().create_time()
    print(f"after {seconds:.0f} s: {what}", flush=True)


def gpu_step(name: str, layers: int, kind: str) -> None:
    """Run one step between cudaProfilerStart and Stop; print what it is billed for as JSON."""
    import torch

    from benchmarks.model_shapes import write_config
    from millrace.config import engine_args
    from millrace.protocol import AddRequest, SamplingParams
    from millrace.replica.build import build_engine

    with tempfile.TemporaryDirectory() as folder:
        model = write_config(Path(folder) / "m", layers, name)
        engine = build_engine(
            engine_args(
                model=str(model), load_format="dummy", skip_tokenizer_init=True,
                enforce_eager=True, async_scheduling=False, enable_prefix_caching=False,
                max_model_len=4096, max_num_seqs=ROWS, max_num_batched_tokens=8192,
                kv_cache_dtype="fp8_e4m3", kv_cache_memory_bytes=CACHE_BYTES,
                mixed_prefill_tokens=8192, long_prefill_token_threshold=0,
                speculative_config={"num_speculative_tokens": 1, "synthetic_acceptance": 0.9},
            )
        )  # fmt: skip
    assert engine.account is not None
    say("the engine is ready")
    lengths = [CONTEXT] * ROWS if kind == "decode" else [PROMPT] * 2
    for number, length in enumerate(lengths):
        prompt = [(17 * number + 3 * at) % 50_000 for at in range(length)]
        most = 512 if kind == "decode" else 4
        while kind != "decode" and engine.has_work():  # the first one has tuned what it needs
            engine.step()
        params = SamplingParams(temperature=1.0, max_tokens=most, ignore_eos=True)
        engine.add(AddRequest(str(number), prompt, params))
    if kind == "decode":
        while engine.stats().running < ROWS or engine.scheduler.committed_counts()[0].prompts:
            engine.step()
        for _ in range(3):
            engine.step()
    before = engine.account.totals().parts
    say("the step begins")
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    engine.step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    after = engine.account.totals().parts
    counts, drafts = engine.scheduler.committed_counts()
    billed = {
        part: {
            "unit": work.unit,
            "flops": work.flops - (before[part].flops if part in before else 0.0),
            "read": work.read - (before[part].read if part in before else 0.0),
            "written": work.written - (before[part].written if part in before else 0.0),
        }
        for part, work in after.items()
    }
    print("BILLED " + json.dumps({"counts": counts._asdict(), "drafts": drafts, "parts": billed}))
    sys.stdout.flush()
    os._exit(0)  # nothing to close under a profiler


def tensor_metrics(ncu: str) -> list[str]:
    """The counters of tensor operations that this chip has, by dtype of the sources. Those that
    tell sparse from dense ones apart count the same operations again."""
    listed = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, timeout=60)
    names = [line.split()[0] for line in listed.stdout.splitlines() if line.startswith(TENSOR)]
    kinds = tuple(f"{TENSOR}{dtype}" for dtype in COUNTED)
    return [f"{name}.sum" for name in names if name.startswith(kinds) and "sparsity" not in name]


def under_ncu(ncu: str, name: str, layers: int, kind: str, limit: float) -> dict[str, Any]:
    """One step's billed work, and its counters, summed over its kernels. limit: seconds."""
    metrics = [*BYTES.values(), *tensor_metrics(ncu), *FP32]
    command = [
        ncu, "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off",
        "--target-processes", "application-only", "--csv", "--page", "raw", "--print-units", "base",
        "--metrics", ",".join(metrics),
        sys.executable, "-m", "benchmarks.work_counted", "--step", kind, "--model", name,
        "--layers", str(layers),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # ncu and the engine below it
        said, _ = process.communicate()
        return {"problem": f"no result within {limit:.0f} s; last: {said[-1500:]}"}
    billed = next((s for s in said.splitlines() if s.startswith("BILLED ")), None)
    if billed is None:
        return {"problem": said[-1500:]}
    return {**json.loads(billed.removeprefix("BILLED ")), "counted": sums(said, metrics)}


def sums(text: str, metrics: list[str]) -> dict[str, Any]:
    """Counters over all kernels, and DRAM bytes by kernel, of ncu's table."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if not rows:
        return {"problem": text[-1500:]}
    head = rows[0]
    found = {metric: 0.0 for metric in metrics if metric in head}
    kernels: dict[str, list[float]] = {}
    for row in rows[2:]:  # the second has units
        cells = dict(zip(head, row, strict=False))
        values = {m: float((cells.get(m) or "0").replace(",", "") or 0) for m in found}
        for metric, value in values.items():
            found[metric] += value
        entry = kernels.setdefault(cells.get("Kernel Name", "")[:60], [0, 0.0, 0.0, 0.0])
        tensor = sum(v for m, v in values.items() if m.startswith(TENSOR))
        for at, value in enumerate(
            (1, values.get(BYTES["read"], 0.0), values.get(BYTES["written"], 0.0), tensor)
        ):
            entry[at] += value
    return {"sums": found, "kernels": kernels}


def judged(step: dict[str, Any]) -> dict[str, Any]:
    """Ratios of what is billed to what is counted."""
    counted = step.get("counted", {}).get("sums")
    if not counted:
        return step
    parts = step["parts"]
    tensor = sum(v for m, v in counted.items() if m.startswith(TENSOR))
    fp32 = sum(times * counted.get(metric, 0.0) for metric, times in FP32.items())
    gemms = sum(parts[name]["flops"] for name in GEMMS if name in parts)
    flops = sum(part["flops"] for part in parts.values())
    read, written = (sum(part[way] for part in parts.values()) for way in ("read", "written"))
    step["ratios"] = {
        "GEMMs to tensor pipes": gemms / max(tensor, 1.0),
        "FLOPs to tensor pipes": flops / max(tensor, 1.0),
        "FLOPs to tensor pipes and FP32": flops / max(tensor + fp32, 1.0),
        "bytes to DRAM": (read + written) / (counted[BYTES["read"]] + counted[BYTES["written"]]),
        "read": read / counted[BYTES["read"]],
        "written": written / counted[BYTES["written"]],
    }
    return step


def on_gpu(name: str, layers: int, limit: float) -> dict[str, Any]:
    """limit: seconds for both steps; the first one has more of them, as it compiles."""
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).exists():
        return {"problem": "ncu is not installed: no hardware counters"}
    shares = {"decode": 0.6, "prompt": 0.4}
    return {
        kind: judged(under_ncu(ncu, name, layers, kind, share * limit))
        for kind, share in shares.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--model", default="qwen3.5-27b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--limit", type=float, default=170.0, help="seconds on a GPU")
    parser.add_argument("--step", choices=["decode", "prompt"], help="for the child process")
    parser.add_argument("--kinds", nargs="*", help="models to run on a CPU")
    options = parser.parse_args()
    if options.step:
        gpu_step(options.model, options.layers, options.step)
    if options.gpu:
        found = on_gpu(options.model, options.layers, options.limit)
    else:
        os.environ["MILLRACE_NATIVE"] = "0"
        found = on_cpu(options.kinds)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
