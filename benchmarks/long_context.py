"""Long prompts on the mini config: RoPE stretched by YaRN, prompts up to 32K in chunks, and cached.

For each length one prompt is computed cold and then sent again, which finds all but its end in the
prefix cache. Measured are the CPU time of the prompt and of the output after it (which other work
on the machine changes little), the TTFT of both, and bytes. Before that, at a smaller length, the
tokens of one prompt must be the same for every chunk size, with MTP and without, cold and cached,
in fp32.

    python benchmarks/long_context.py --out benchmarks/results/long_context.json \
        --plot docs/images/long_context.png      # the plot needs matplotlib (extra `train`)

The weights are the mini model's, which was trained on short texts. So this checks that the engine
is correct at every position, not what the model makes of a long text.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from millrace import LLM, SamplingParams
from millrace.model.cache_spec import CacheOptions
from millrace.model.config import read_config
from millrace.model_lookup import find_model

ORIGINAL, FACTOR = 4096, 9  # positions: 36,864
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
CHUNKS = (256, 1000, 2048, 8192)
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_num_seqs": 1, "num_snapshots": 8,
    "kv_cache_memory_bytes": 1 << 30,
}  # fmt: skip
MTP = {"method": "mtp", "num_speculative_tokens": 1}
OUTPUT = 33  # tokens behind each prompt
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def stretched(model: Path, directory: Path) -> Path:
    """The model with its RoPE stretched: links to its files, and a config of its own."""
    for file in model.iterdir():
        if file.name != "config.json":
            (directory / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = ORIGINAL * FACTOR
    config["rope_parameters"] |= {
        "rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": ORIGINAL,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def prompt_of(length: int, seed: int, vocabulary: int = 4000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, vocabulary) for _ in range(length)]


def check_equal(model: Path, length: int) -> dict[str, Any]:
    """One prompt under every chunk size, with MTP and without, cold and cached: equal tokens."""
    prompt, said, cached = prompt_of(length, 1), {}, []
    params = SamplingParams(max_tokens=24, **GREEDY)
    for spec in (None, MTP):
        for chunk in CHUNKS:
            with LLM(
                str(model), max_num_batched_tokens=chunk, speculative_config=spec, **OPTIONS
            ) as llm:
                for use in ("cold", "cached"):
                    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
                    said[f"{chunk} {'mtp' if spec else 'plain'} {use}"] = tuple(
                        output.outputs[0].token_ids
                    )
                cached.append(output.num_cached_tokens)
    assert len(set(said.values())) == 1, said
    assert min(cached) >= length - 64, cached
    return {"length": length, "runs": len(said), "cached": min(cached)}


def measure(llm: LLM, length: int) -> dict[str, float]:
    """One prompt, cold and again."""
    prompt, before = prompt_of(length, length), pages(llm)
    params = SamplingParams(max_tokens=OUTPUT, **GREEDY)
    outputs, spent = [], []
    for _ in range(2):
        began = time.process_time()
        outputs += llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        spent.append(time.process_time() - began)
    cold, again = outputs
    assert cold.outputs[0].token_ids == again.outputs[0].token_ids
    first, second = (one.metrics.first_token_time - one.metrics.arrival_time for one in outputs)
    behind = again.metrics.finished_time - again.metrics.first_token_time
    return {
        "length": length,
        "prefill_cpu_s": spent[0] - spent[1],
        "cached_cpu_s": spent[1],
        "ttft_cold_s": first,
        "ttft_cached_s": second,
        "cached_tokens": again.num_cached_tokens,
        "decode_s": behind,
        "pages": pages(llm) - before,
        "resident_mb": psutil.Process().memory_info().rss / 1e6,
    }


def pages(llm: LLM) -> int:
    """KV pages in use; once nothing runs, those that the prefix cache keeps."""
    stats = llm.stats()
    return stats.total_pages - stats.free_pages


def plot(rows: list[dict[str, float]], page_bytes: int, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = [row["length"] / 1024 for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    axes[0].plot(lengths, [r["ttft_cold_s"] for r in rows], "o-", label="cold")
    axes[0].plot(lengths, [r["ttft_cached_s"] for r in rows], "s-", label="cached")
    axes[0].set(title="time to the first token (s)", yscale="log")
    axes[0].legend()
    axes[1].plot(lengths, [r["length"] / r["prefill_cpu_s"] for r in rows], "o-", label="prompt")
    axes[1].plot(lengths, [OUTPUT / r["cached_cpu_s"] for r in rows], "s-", label="output")
    axes[1].set(title="tokens a second of CPU time", yscale="log")
    axes[1].legend()
    page_megabytes = [row["pages"] * page_bytes / 1e6 for row in rows]
    axes[2].plot(lengths, page_megabytes, "o-", label="KV pages of the prompt")
    axes[2].plot(
        lengths, [r["resident_mb"] - rows[0]["resident_mb"] for r in rows], "s-",
        label="growth of the process",
    )  # fmt: skip
    axes[2].set(title="memory (MB)")
    axes[2].legend()
    for axis in axes:
        axis.set(xlabel="prompt (Ki tokens)", xscale="log", xticks=lengths)
        axis.set_xticklabels([f"{length:g}" for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)


def cache_options(dtype: str) -> CacheOptions:
    """Those of the measured engine that pages depend on."""
    return CacheOptions(
        dtype, dtype, "float32", page_size=16, max_pages=1, drafts=1, window=16, draft_head=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--equal-at", type=int, default=5000, help="0 leaves that check out")
    parser.add_argument("--dtype", default="bfloat16", help="of what is measured")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replot", type=Path, help="only draw what this file of --out holds")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.replot:
        found = json.loads(options.replot.read_text())
        plot(found["rows"], found["page_bytes"], options.plot)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        model = stretched(find_model(options.model), Path(directory))
        equal = check_equal(model, options.equal_at) if options.equal_at else None
        print("equal tokens:", equal, flush=True)
        rows, page_bytes = (
            [],
            read_config(model).cache_spec(cache_options(options.dtype)).page_bytes(),
        )
        with LLM(str(model), max_num_batched_tokens=2048, speculative_config=MTP, **OPTIONS) as llm:
            measure(llm, 256)  # warm
            for length in (one for one in LENGTHS if one <= options.longest):
                rows.append(measure(llm, length))
                print(json.dumps({k: round(v, 4) for k, v in rows[-1].items()}), flush=True)
    found = {"equal": equal, "page_bytes": page_bytes, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(rows, page_bytes, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
