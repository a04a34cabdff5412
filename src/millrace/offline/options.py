"""Options of the measurements, with their help texts; those of the engine stand elsewhere."""

from __future__ import annotations

import msgspec

OFFLINE_HELP = {
    "num_prompts": "Prompts, all handed in at once.",
    "num_warmups": "Prompts that run before.",
    "input_len": "Tokens of a prompt.",
    "output_len": "Tokens of an output.",
    "random_range_ratio": "Lengths vary by this share, up and down.",
    "n": "Outputs of each prompt.",
    "disable_detokenize": "Do not turn tokens into text.",
    "output_json": "File for the results.",
    "batch_size": "Prompts of an iteration.",
    "num_iters": "Iterations that are measured.",
    "num_iters_warmup": "Iterations that run before.",
}


class ThroughputOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `bench throughput`. All prompts are handed in at once; their lengths vary by
    random_range_ratio."""

    num_prompts: int = 1000
    num_warmups: int = 0
    input_len: int = 1024
    output_len: int = 128
    random_range_ratio: float = 0.0
    n: int = 1
    disable_detokenize: bool = False
    output_json: str | None = None


class LatencyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `bench latency`. Each iteration is one batch, from its first token in to its last
    token out."""

    batch_size: int = 8
    num_iters: int = 30
    num_iters_warmup: int = 10
    input_len: int = 32
    output_len: int = 128
    n: int = 1
    disable_detokenize: bool = False
    output_json: str | None = None
