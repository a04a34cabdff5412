"""The parameters of a step model, each with what it means, its prior and where that comes from.

A parameter is a positive number with a relative uncertainty: its logarithm is normal. That of one
engine on one GPU is base x engine's factor x GPU's factor. The priors were not fitted to the rows
that the golden file holds out; where an engine or a GPU has no data, they are all there is.
"""

from __future__ import annotations

import msgspec


class Parameter(msgspec.Struct, frozen=True):
    """mean: in `unit`. spread: standard deviation of its logarithm, for the base. engines, gpus:
    how far, in the same measure, one engine or one GPU may be from the base; 0: not at all."""

    name: str
    mean: float
    spread: float
    engines: float
    gpus: float
    unit: str
    meaning: str
    source: str


PARAMETERS = {
    p.name: p
    for p in (
        Parameter(
            "gemm", 0.66, 0.15, 0.12, 0.20, "share of the dense rate",
            "GEMMs of linear layers with many tokens", "FP8 library kernels: 60 to 75% of the rate",
        ),
        Parameter(
            "grouped", 0.45, 0.3, 0.25, 0.25, "share of the dense rate",
            "grouped GEMMs of experts", "published grouped kernels: 30 to 65% of the rate",
        ),
        Parameter(
            "stream", 0.80, 0.08, 0.06, 0.10, "share of the bandwidth",
            "reading weights for few tokens", "copies reach 85 to 92%; planners take 80%",
        ),
        Parameter(
            "expert_stream", 0.60, 0.25, 0.2, 0.2, "share of the bandwidth",
            "reading the experts that few tokens go to", "small scattered reads; published kernels",
        ),
        Parameter(
            "states", 0.65, 0.2, 0.25, 0.15, "share of the bandwidth",
            "recurrent states of decode rows", "first unrefined kernels reach 60 to 80%",
        ),
        Parameter(
            "kv", 0.55, 0.2, 0.2, 0.15, "share of the bandwidth",
            "keys and values of decode rows", "library kernels on FP8 KV: 40 to 70%",
        ),
        Parameter(
            "attention", 0.30, 0.3, 0.3, 0.25, "share of the dense 16-bit rate",
            "attention of prompts, masked half not counted", "heads of 256: 200 to 450 TFLOP/s",
        ),
        Parameter(
            "recurrence", 0.12, 0.35, 0.35, 0.25, "share of the dense 16-bit rate",
            "recurrence of prompts", "published tables of chunked kernels",
        ),
        Parameter(
            "pointwise", 0.65, 0.2, 0.25, 0.15, "share of the bandwidth",
            "norms, gates, activations, quantising, copies", "fused kernels come near a copy",
        ),
        Parameter(
            "slowdown", 1.0, 0.02, 0.20, 0.12, "factor",
            "all of the device's time: how mature an engine is, how well it suits a GPU",
            "planners carried to another GPU miss by 13 to 16% in the median",
        ),
        Parameter(
            "launches", 18e-6, 0.5, 0.5, 0.3, "seconds a layer",
            "gaps and short kernels between the large ones", "12 to 20 short kernels a layer",
        ),
        Parameter(
            "step_host", 1.0e-3, 0.5, 0.8, 0.3, "seconds a step",
            "what the device waits for at each step: planning, launching, reading back",
            "schedulers written in Python",
        ),
        Parameter(
            "token_host", 3e-6, 0.6, 0.8, 0.3, "seconds a token and step",
            "the same for each token of a decode row, and for each prompt: inputs, results",
            "schedulers written in Python",
        ),
        Parameter(
            "draft_host", 2.0e-3, 0.5, 0.9, 0.3, "seconds a draft behind the first",
            "each further pass of the draft head beside its work: its inputs, its launches",
            "drafters outside of CUDA graphs take some milliseconds, inside some tenths",
        ),
        Parameter(
            "chunk_server", 85e-6, 0.3, 1.0, 0.2, "seconds a chunk",
            "server process for one streamed piece, in series with the engine",
            "servers and relays measured here and elsewhere: 20 to 300 us a chunk",
        ),
        Parameter(
            "request_server", 2e-3, 0.4, 0.8, 0.2, "seconds a request",
            "server process for one request: parsing, tokens, first chunk", "measured servers",
        ),
        Parameter(
            "away", 0.06, 0.4, 1.0, 0.2, "share of the streams",
            "streams in queues of the server processes, or at the rank that has too many",
            "engines that balance well have next to none",
        ),
        Parameter(
            "sum_latency", 6e-6, 0.35, 0.5, 0.3, "seconds a sum of two ranks",
            "all-reduce of a few KiB within a CUDA graph", "one-shot kernels 5 to 10 us, NCCL 10",
        ),
        Parameter(
            "sum_rate", 0.40, 0.3, 0.3, 0.3, "share of the link's bandwidth",
            "all-reduce of several MiB", "NCCL and two-shot kernels",
        ),
        Parameter(
            "energy_flop", 0.40, 0.2, 0.1, 0.25, "pJ a FLOP, FP8",
            "energy of GEMMs", "0.49 to 0.55 pJ with all else, one H200",
        ),
        Parameter(
            "energy_byte", 90.0, 0.3, 0.1, 0.3, "pJ a byte",
            "energy of memory traffic", "HBM 4 to 7 pJ a bit, and the way through the chip",
        ),
    )
}  # fmt: skip
# p of (compute^p + memory^p)^(1/p): 1: one after the other; large: the longer one hides the other.
OVERLAP = 1.3
