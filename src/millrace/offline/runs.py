"""Random prompts through one engine in this process: how many tokens a second, and how long.

Figures and result files have vLLM's names, so that its scripts read them. The clock runs from the
first prompt handed in to the last token of the last one; loading the model is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millrace.bench.workload.prompts import Prompt, RandomSpec, random_prompts
from millrace.errors import ConfigError
from millrace.llm import LLM
from millrace.offline.options import LatencyOptions, ThroughputOptions
from millrace.protocol import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def measure_throughput(model: str, options: ThroughputOptions, engine: dict[str, Any]) -> str:
    """Run the prompts through `model`; the report. engine: options of `LLM`. Raises UserError."""
    _check(options, "num_prompts", "input_len", "output_len", "n")
    with LLM(model, **engine) as llm:
        warm_ups, prompts = (
            random_prompts(
                RandomSpec(
                    count=count,
                    input_len=options.input_len,
                    output_len=options.output_len,
                    range_ratio=options.random_range_ratio,
                    vocab_size=llm.vocab_size,
                    seed=seed,
                )
            )
            for count, seed in ((options.num_warmups, 1), (options.num_prompts, 0))
        )
        if warm_ups:
            _run(llm, warm_ups, options)
        seconds, outputs = _run(llm, prompts, options)
    inputs = sum(prompt.input_tokens for prompt in prompts)
    results = {
        "model_id": model,
        "elapsed_time": seconds,
        "num_requests": len(prompts),
        "total_num_tokens": inputs + outputs,
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": (inputs + outputs) / seconds,
    }
    _write(results, options.output_json)
    return (
        f"Throughput: {len(prompts) / seconds:.2f} requests/s, "
        f"{(inputs + outputs) / seconds:.2f} total tokens/s, "
        f"{outputs / seconds:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {inputs}\n"
        f"Total num output tokens:  {outputs}"
    )


def measure_latency(model: str, options: LatencyOptions, engine: dict[str, Any]) -> str:
    """Run the batch `num_iters` times; the report. engine: options of `LLM`. Raises UserError.

    The prefix cache is off unless `engine` says otherwise: every iteration has the same prompts.
    """
    _check(options, "batch_size", "num_iters", "input_len", "output_len", "n")
    with LLM(model, **{"enable_prefix_caching": False, **engine}) as llm:
        spec = RandomSpec(
            count=options.batch_size,
            input_len=options.input_len,
            output_len=options.output_len,
            vocab_size=llm.vocab_size,
        )
        prompts = random_prompts(spec)
        for _ in range(options.num_iters_warmup):
            _run(llm, prompts, options)
        latencies = [_run(llm, prompts, options)[0] for _ in range(options.num_iters)]
    percentiles = [float(value) for value in np.percentile(latencies, PERCENTILES)]
    mean = float(np.mean(latencies))
    results = {
        "model_id": model,
        "avg_latency": mean,
        "latencies": latencies,
        "percentiles": dict(zip(map(str, PERCENTILES), percentiles, strict=True)),
    }
    _write(results, options.output_json)
    lines = [f"Avg latency: {mean} seconds"]
    pairs = zip(PERCENTILES, percentiles, strict=True)
    return "\n".join([*lines, *(f"{p}% percentile latency: {value} seconds" for p, value in pairs)])


def _run(
    llm: LLM, prompts: Sequence[Prompt], options: ThroughputOptions | LatencyOptions
) -> tuple[float, int]:
    """(seconds, output tokens) of all prompts together."""
    params = [
        SamplingParams(
            n=options.n,
            temperature=1.0,
            ignore_eos=True,
            max_tokens=prompt.output_tokens,
            detokenize=not options.disable_detokenize,
        )
        for prompt in prompts
    ]
    inputs: list[Any] = [{"prompt_token_ids": prompt.content} for prompt in prompts]
    began = time.perf_counter()
    outputs = llm.generate(inputs, params)
    seconds = time.perf_counter() - began
    return seconds, sum(len(one.token_ids) for output in outputs for one in output.outputs)


def _check(options: msgspec.Struct, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} {getattr(options, name)}: use 1 or more")


def _write(results: dict[str, Any], path: str | None) -> None:
    if path is not None:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(results)))
