"""Milliseconds of a decoding step of two ranks with a vocabulary of 248,320 tokens and little else.

    python benchmarks/tp_step.py               # another commit's: PYTHONPATH=OTHER_CHECKOUT/src

Sixteen requests at temperature 1 on a model of random weights with a hidden size of 64. On CPUs.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from millrace.config import engine_args
from millrace.model.tiny import UNIT_TEST, write_checkpoint
from millrace.protocol import AddRequest, SamplingParams
from millrace.replica.build import build_engine

REQUESTS, TOKENS = 16, 60


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        shape = replace(UNIT_TEST, vocab_size=248_320)
        model = write_checkpoint(Path(directory, "model"), shape, seed=1)
        engine = build_engine(
            engine_args(
                model=str(model),
                dtype="float32",
                device="cpu",
                max_num_seqs=REQUESTS,
                max_model_len=256,
                tensor_parallel_size=2,
                kv_cache_memory_bytes=1 << 27,
            )
        )
        rng = random.Random(1)
        for number in range(REQUESTS):
            prompt = [rng.randrange(3, 2000) for _ in range(8)]
            params = SamplingParams(
                temperature=1.0, seed=number, max_tokens=TOKENS, ignore_eos=True
            )
            engine.add(AddRequest(str(number), prompt, params))
        took = []
        while engine.has_work():
            began = time.perf_counter()
            engine.step()
            took.append(time.perf_counter() - began)
        engine.close()
    print(f"{statistics.median(took[8:-4]) * 1e3:.1f} ms a step")


if __name__ == "__main__":
    main()
