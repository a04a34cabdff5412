"""The price of --batch-invariant on a device, and how often answers differ without it.

    python -m benchmarks.batch_invariance [--model models/millrace-mini] [--dtype bfloat16]

Two engines, with the flag and without, answer the same requests by turns, round by round, on one
thread. It prints tokens a second of each kind of load as a ratio of the two, with the spread of the
rounds: of the processor's time, not the clock's, unless a GPU computes. Then both
read the first part of each of their own answers again as a prompt, as a resumed stream does, and
say how many answers go on differently.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from millrace.config import engine_args
from millrace.engine.engine import Engine
from millrace.protocol import AddRequest, SamplingParams
from millrace.replica.build import build_engine

MODEL = Path(__file__).parent.parent / "models" / "millrace-mini"
ROWS = 16


class Load(NamedTuple):
    """Tokens of each prompt and answer."""

    prompt: int
    answer: int


LOADS = {"decode": Load(16, 96), "prompts": Load(384, 1), "mixed": Load(128, 64)}


def answers(engine: Engine, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
        engine.add(AddRequest(str(number), list(prompt), params))
    out: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for delta in engine.step():
            out[int(delta.id)] += delta.token_ids
    return out


def seconds(engine: Engine, prompts: Sequence[Sequence[int]], most: int) -> float:
    """Of the processor, so that other work on the machine matters little; of the clock where a GPU
    computes."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    answers(engine, prompts, most)
    return clock() - start


def texts(rng: random.Random, load: Load) -> list[list[int]]:
    return [[rng.randrange(3, 250) for _ in range(load.prompt)] for _ in range(ROWS)]


def differing(engine: Engine, prompts: list[list[int]], most: int) -> tuple[int, int]:
    """(resumed answers that go on differently, all of them)."""
    whole, count, total = answers(engine, prompts, most), 0, 0
    for cut in (1, 7, most // 3, most // 2, most - 5):
        begun = [[*p, *a[:cut]] for p, a in zip(prompts, whole, strict=True)]
        rest = answers(engine, begun, most - cut)
        count += sum(a[cut:] != b for a, b in zip(whole, rest, strict=True))
        total += len(prompts)
    return count, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    spec = {"speculative_config": {"num_speculative_tokens": args.drafts}} if args.drafts else {}
    engines = {
        flag: build_engine(
            engine_args(
                model=args.model, device=args.device, dtype=args.dtype, max_num_seqs=ROWS,
                max_model_len=1024, enable_prefix_caching=False, batch_invariant=flag, **spec,
            )
        )
        for flag in (False, True)
    }  # fmt: skip
    torch.set_num_threads(1)
    rng = random.Random(1)
    print(f"{args.model}, {args.dtype}, {args.drafts} drafts, {ROWS} rows, {args.rounds} rounds")
    for name, load in LOADS.items():
        rates: dict[bool, list[float]] = {False: [], True: []}
        for round_ in range(args.rounds + 1):  # the first one warms up
            prompts = texts(rng, load)
            for flag in (False, True) if round_ % 2 else (True, False):
                took = seconds(engines[flag], prompts, load.answer)
                rates[flag].append(ROWS * (load.prompt + load.answer) / took)
        ratios = [on / off for off, on in zip(rates[False][1:], rates[True][1:], strict=True)]
        off, on = (statistics.median(rates[flag][1:]) for flag in (False, True))
        print(
            f"{name}: {off:.0f} tok/s without, {on:.0f} with; "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    prompts = [text[: 8 + 3 * i] for i, text in enumerate(texts(rng, Load(64, 0)))]
    for flag, engine in engines.items():
        count, total = differing(engine, prompts, 64)
        print(f"{'with' if flag else 'without'}: {count} of {total} resumed answers differ")
        engine.close()


if __name__ == "__main__":
    main()
