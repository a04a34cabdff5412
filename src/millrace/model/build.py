"""Builds one rank's model, of any family, with empty weights."""

from __future__ import annotations

import math

import torch

from millrace.model.build_context import BuildContext
from millrace.model.causal_lm import CausalLM
from millrace.model.config import ModelConfig
from millrace.model.parallel import TensorParallel, check_ranks
from millrace.model.parameter import parameters_with_pieces
from millrace.model.registry import family_named


def build_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    tp: TensorParallel | None = None,
    max_len: int | None = None,
    mtp: bool = False,
    keep_quantized: bool | None = False,
    draft_fp8: bool | None = False,
) -> CausalLM:
    """One rank's model with empty weights.

    dtype: float32 or bfloat16. max_len: positions of the rotary table (default: the model's
    maximum). mtp: with the draft head, if the model has one. keep_quantized: quantized weights of
    the checkpoint stay as they are; else they become `dtype` when loaded; None: they stay where the
    device has a GEMM for them. draft_fp8: drafts use an FP8 copy of the output head; None: if FP8
    weights stay FP8. Raises ConfigError if the model cannot be split over the ranks.
    """
    tp = tp or TensorParallel()
    check_ranks(config, tp.size, tp.whole_experts)
    build = BuildContext(config, tp, dtype, torch.device(device), keep_quantized)
    found, mtp = config.quantization, mtp and config.mtp_layers > 0
    if draft_fp8 is None:
        draft_fp8 = found.method == "fp8" and build.keeps(found.format)
    model = family_named(config.family).build(build, max_len or config.max_positions, mtp)
    if mtp and draft_fp8:
        model.use_fp8_draft_head()
    return model.eval()


def count_weights(config: ModelConfig) -> int:
    """Weights of the model, without its draft head and without scales."""
    model = build_model(config, dtype=torch.bfloat16, device="meta", max_len=1)
    sizes: dict[str, int] = {}
    for _, pieces in parameters_with_pieces(model):
        sizes |= {piece.name: math.prod(piece.shape) for piece in pieces}
    return sum(sizes.values())


def rank_bytes(
    config: ModelConfig,
    dtype: str,
    ranks: int,
    *,
    mtp: bool,
    kept: bool,
    whole_experts: bool = False,
) -> int:
    """Bytes of the weights on one rank; kept: quantized ones stay so. whole_experts: with expert
    parallelism. Raises ConfigError if the model cannot be split over the ranks."""
    model = build_model(
        config,
        dtype=torch.float32 if dtype == "float32" else torch.bfloat16,
        device="meta",
        tp=TensorParallel(0, ranks, whole_experts=whole_experts),
        max_len=1,
        mtp=mtp,
        keep_quantized=kept,
        draft_fp8=False,
    )
    return sum(param.nbytes for param in model.parameters())
