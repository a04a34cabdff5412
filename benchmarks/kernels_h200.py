"""Check and time every GPU op at the shapes of the 27B model, with the lower bound of each time.

    python benchmarks/kernels_h200.py [--only gdn_decode,gemm] [--out results.json] [--warm 12]
    TRITON_INTERPRET=1 python benchmarks/kernels_h200.py --dry-run   # a machine without a GPU

The cases are in kernel_cases/, a module for each section. Every variant that is timed is first
compared with a reference in float64 or float32 on fresh random inputs. The lower bound is the
larger of bytes / copy bandwidth and FLOPs / matrix rate; both rates are measured by the same run,
except FP8's, which is taken as 1,300 TFLOP/s. Times are medians over replays of a CUDA graph whose
calls together touch more memory than the L2 cache holds, so they contain neither launch overhead
nor cache hits. --warm N compiles in N processes beforehand (Triton caches what it compiles).
Sections run in the order given, and results are merged into --out, so that several calls can share
the work. With --warm 14 all of them take some five minutes on an H200; --quick leaves out the
variants that were slower before. --joules SECONDS plays every case for so long, counts the device's
energy, and prints joules, watts and the time of a call at the power limit. --dry-run checks small
float32 cases of the newer variants in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from kernel_cases import (
    attention,
    attention_dense,
    fused,
    gdn_decode,
    gdn_prefill,
    gemm,
    gemm_clusters,
    moe,
    sampling,
    w4,
)
from kernel_cases.case import Case, ceilings, measure
from kernel_cases.dry_run import dry_run

SECTIONS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "gdn_decode": gdn_decode.cases,
    "gdn_step": gdn_decode.step_cases,
    "gdn_blocks": gdn_decode.block_cases,
    "gdn_prefill": gdn_prefill.cases,
    "gemm": gemm.cases,
    "gemm_few": gemm.few_cases,
    "gemm_clusters": gemm_clusters.cases,
    "w4": w4.cases,
    "attention": attention.cases,
    "attention_few_rows": attention.few_rows_cases,
    "attention_dense": attention_dense.cases,
    "attention_prompts": attention.prompt_cases,
    "fused": fused.cases,
    "moe": moe.cases,
    "sampling": sampling.cases,
}


def warm(workers: int, only: str, quick: bool) -> None:
    """Compile every variant in parallel processes; failures show up in the real run."""
    command = [sys.executable, __file__, "--only", only, *(["--quick"] if quick else []), "--shard"]
    running = [
        subprocess.Popen(
            [*command, f"{i}/{workers}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for i in range(workers)
    ]
    for process in running:
        process.wait()


def compile_shard(shard: str, only: list[str], quick: bool) -> None:
    mine, workers = (int(x) for x in shard.split("/"))
    index = 0
    for section in only:
        for case in SECTIONS[section](quick):
            index += 1
            if index % workers == mine:
                try:
                    case.check()
                except Exception as error:
                    print(section, case.name, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("kernels_h200.json"))
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--joules", type=float, default=0.0, help="seconds a case")
    parser.add_argument("--quick", action="store_true", help="without variants known to lose")
    parser.add_argument("--dry-run", action="store_true", help="newer variants, interpreted")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    only = args.only.split(",")
    if unknown := [section for section in only if section not in SECTIONS]:
        parser.error(f"--only: no {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if args.dry_run:
        sys.exit(dry_run())
    if args.shard:
        compile_shard(args.shard, only, args.quick)
        return
    if args.warm:
        warm(args.warm, args.only, args.quick)
    ceiling = ceilings()
    print({name: f"{value / 1e12:.2f}T" for name, value in ceiling.items()}, flush=True)
    results: dict[str, object] = json.loads(args.out.read_text()) if args.out.exists() else {}
    results |= {"device": torch.cuda.get_device_name(), "ceilings": ceiling}
    for section in only:
        rows = []
        for case in SECTIONS[section](args.quick):
            row = measure(case, ceiling, args.joules)
            rows.append(row)
            figures = f"{row.get('us', 0):9.1f} us  floor {row['floor_us']:8.1f}"
            rates = f"{row.get('tb_s', 0):5.2f} TB/s {row.get('tflop_s', 0):7.1f} TF"
            state = row.get("failed") or f"err {row['error']:.1e}{'' if row['right'] else ' WRONG'}"
            if "joules" in row:
                rates += f" {row['sustained_us']:8.1f} us {1e3 * row['joules']:7.2f} mJ"
                rates += f" {row['watts']:4.0f} W"
            print(f"{section:11s} {case.name:44s} {figures}  {rates}  {state}", flush=True)
            results[section] = rows
            args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
