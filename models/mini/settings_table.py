"""What each engine setting costs in accuracy: paired over the same held-out items, against fp32.

    python models/mini/settings_table.py --num-items 1000 --out models/mini/results
    python models/mini/settings_table.py --model millrace-mini-moe --fp8-twin DIRECTORY --out OUT

Runs `millrace.LLM` once a setting, writes each run's answers as `millrace eval --json` does, and
prints (and writes as settings.md) one row per setting: items that changed each way, McNemar's exact
p, and with MTP the share of drafts accepted by position. A setting that is done is read from its
file, so that the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from millrace.eval.evaluation import make_all, run_items
from millrace.eval.models import GenerationOptions, InProcess
from millrace.eval.results import compare_results, read_results, write_results

MODELS = Path(__file__).parents[1]
REFERENCE = "fp32"


@dataclass(frozen=True)
class Setting:
    """A name, and what of LLM's options makes it. Each differs from another in one thing.

    fp8, int4: of the FP8 or int4 twin. mixture: only of a mixture of experts.
    """

    name: str
    fp8: bool = False
    int4: bool = False
    mixture: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return self.name.replace(" ", "-").replace(",", "") + ".json"


def _mtp(k: int) -> dict[str, Any]:
    return {"method": "mtp", "num_speculative_tokens": k}


PLAIN = {"dtype": "bfloat16", "enable_prefix_caching": False}
SETTINGS = (
    Setting(REFERENCE, options={"dtype": "float32", "enable_prefix_caching": False}),
    Setting("bf16", options=PLAIN),
    Setting("bf16, prefix cache", options={**PLAIN, "enable_prefix_caching": True}),
    Setting("bf16, KV fp8", options={**PLAIN, "kv_cache_dtype": "fp8"}),
    Setting("bf16, state bf16", options={**PLAIN, "mamba_ssm_cache_dtype": "bfloat16"}),
    Setting("FP8 weights", fp8=True, options=PLAIN),
    Setting("FP8 weights, KV fp8", fp8=True, options={**PLAIN, "kv_cache_dtype": "fp8"}),
    Setting("bf16, two ranks", mixture=True, options={**PLAIN, "tensor_parallel_size": 2}),
    Setting("bf16, two ranks of whole experts", mixture=True,
            options={**PLAIN, "tensor_parallel_size": 2, "enable_expert_parallel": True}),
    Setting("int4 weights", int4=True, options=PLAIN),
    *(Setting(f"bf16, MTP {k}", options={**PLAIN, "speculative_config": _mtp(k)})
      for k in (1, 2, 3, 4, 5)),
    Setting("fp32, MTP 3", options={"dtype": "float32", "enable_prefix_caching": False,
                                    "speculative_config": _mtp(3)}),
    Setting("all together", fp8=True, options=
            {"dtype": "bfloat16", "enable_prefix_caching": True, "kv_cache_dtype": "fp8",
             "mamba_ssm_cache_dtype": "bfloat16", "speculative_config": _mtp(1)}),
)  # fmt: skip


def run(setting: Setting, args: argparse.Namespace) -> Path:
    """Answers of one setting, from its file if it is there and asked the same."""
    path: Path = args.out / setting.file
    told = {"num_items": args.num_items, "seed": args.seed, "tasks": args.tasks}
    if path.exists():
        known = read_results(path)["run"]
        if all(known.get(key) == value for key, value in told.items()):
            return path
    items = make_all(args.tasks.split(","), args.num_items, args.seed)
    name = args.model + "-fp8" * setting.fp8 + "-int4" * setting.int4
    directory = str(args.fp8_twin if setting.fp8 else MODELS / name)
    model = InProcess(directory, args.concurrency, seed=args.seed, **setting.options)
    began = time.perf_counter()
    answers = run_items(model, items, GenerationOptions())
    seconds = round(time.perf_counter() - began, 2)
    about = {"model": name, "options": setting.options, **told, "seconds": seconds}
    write_results(path, {**about, "accepted": accepted_shares(model)}, answers)
    model.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next engine sizes itself by what is free
    return path


def accepted_shares(model: InProcess) -> list[float]:
    """Of all verified rows, the share in which draft 1, 2, .. was accepted."""
    stats = model.stats()
    return [round(count / max(1, stats.drafts), 4) for count in stats.accepted_per_position]


def table(settings: list[Setting], args: argparse.Namespace) -> str:
    tasks = args.tasks.split(",")
    head = ["setting"]
    for task in tasks:
        head += [f"{task} right", "lost", "gained", "p"]
    head.append("drafts accepted")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    reference = args.out / SETTINGS[0].file
    for setting in settings:
        paired = compare_results(reference, args.out / setting.file)
        cells = [setting.name]
        for task in tasks:
            p = paired[task]
            flips = ["", "", ""] if setting.name == REFERENCE else [
                str(p.lost), str(p.gained), f"{p.p_value:.3g}"
            ]  # fmt: skip
            cells += [f"{p.right_b}/{p.items}", *flips]
        accepted = read_results(args.out / setting.file)["run"]["accepted"]
        cells.append(" ".join(f"{share:.1%}" for share in accepted))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="millrace-mini", help="one of models/")
    parser.add_argument("--fp8-twin", type=Path, help="default: models/MODEL-fp8")
    parser.add_argument("--num-items", type=int, default=1000, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", default="policy,math")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", help="settings by name, separated by ';', fp32 always first")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.fp8_twin = args.fp8_twin or MODELS / f"{args.model}-fp8"
    mixture = "num_experts" in json.loads((MODELS / args.model / "config.json").read_text())
    wanted = args.only.split(";") if args.only else [s.name for s in SETTINGS]
    chosen = [s for s in SETTINGS if s.name == REFERENCE or s.name in wanted]
    chosen = [s for s in chosen if mixture or not s.mixture]
    done, refused = [], []
    for setting in chosen:
        try:
            path = run(setting, args)
        except Exception as error:  # a setting that this device lacks must not cost the others
            if setting.name == REFERENCE:
                raise
            refused.append(f"{setting.name}: {error}")
            print(refused[-1], flush=True)
            continue
        done.append(setting)
        print(setting.name, json.dumps(read_results(path)["run"]), flush=True)
    text = table(done, args) + "".join(f"\nNot run: {line}\n" for line in refused)
    (args.out / "settings.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
