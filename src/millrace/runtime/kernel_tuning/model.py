"""What a model asks of the kernels of this GPU, by its description: no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from millrace.kernels.gemm import CODES_PER_WORD, W4
from millrace.kernels.gpu.device import gpu
from millrace.kernels.gpu.tables import Shape
from millrace.kernels.quantize import GROUP
from millrace.model.build import build_model
from millrace.model.config import read_config
from millrace.model.formats.fp8_block import FORMAT as FP8
from millrace.model.layers.attention import Attention
from millrace.model.parallel import TensorParallel
from millrace.model.vocabulary import Fp8DraftHead
from millrace.model.w4.format import W4Linear
from millrace.model.weight_format import Linear
from millrace.runtime.kernel_tuning.attention import DecodeAttention
from millrace.runtime.kernel_tuning.choice import Section
from millrace.runtime.kernel_tuning.products import Fp8Libraries, Fp8Tiles, W4Products, device


@dataclass(frozen=True)
class Request:
    """What is to be measured. ranks: the model is split over. widths: tokens of a decode row, one
    and its drafts. cached: bytes of a cached key's number. tokens: sizes of products; none: those
    where choices are known to change."""

    ranks: int
    widths: tuple[int, ...]
    cached: int
    page: int
    tokens: tuple[int, ...] = ()


def sections_of(directory: Path, request: Request) -> list[Section]:
    """The sections that this GPU and this model have. Raises CheckpointError or ConfigError."""
    config = read_config(directory)
    model = build_model(
        config, dtype=torch.bfloat16, device="meta", tp=TensorParallel(0, request.ranks),
        max_len=1, mtp=True, keep_quantized=True,
    )  # fmt: skip
    modules = list(model.modules())
    found: list[Section] = []
    draft = model.draft_output
    heads = [tuple(draft.weight.shape)] if isinstance(draft, Fp8DraftHead) else []
    if FP8.is_fast_on(torch.device(device())):
        found += _fp8_sections(sorted({*_fp8_shapes(modules), *heads}), request.tokens)
    found += _w4_sections(modules, request.tokens)
    attention = next((m for m in modules if isinstance(m, Attention)), None)
    if attention is not None:
        group = attention.heads // attention.kv_heads
        shapes = [(group, attention.head_dim, request.cached, width) for width in request.widths]
        found.append(DecodeAttention(shapes, attention.kv_heads, request.page))
    return [section for section in found if section.shapes()]


def _fp8_shapes(modules: Sequence[torch.nn.Module]) -> set[Shape]:
    found: set[Shape] = set()
    for module in modules:
        if isinstance(module, Linear) and module.takes_fp8:
            found.add((module.outputs, module.inputs))
        if isinstance(module, Attention) and module.qkv_proj.takes_fp8:
            # For tokens that are not sampled, the draft head computes keys and values only.
            found.add((sum(module.widths[2:]), module.qkv_proj.inputs))
    return found


def _fp8_sections(shapes: Sequence[Shape], tokens: Sequence[int]) -> list[Section]:
    """Hopper has two libraries for whole groups; all else is our Triton kernel's."""
    whole = [s for s in shapes if not any(size % GROUP for size in s) and gpu().is_hopper]
    odd = [shape for shape in shapes if shape not in whole]
    return [Fp8Libraries(whole, tokens), Fp8Tiles(odd, tokens)]


def _w4_sections(modules: Sequence[torch.nn.Module], tokens: Sequence[int]) -> list[Section]:
    found = [module for module in modules if isinstance(module, W4Linear)]
    if not found:
        return []
    shapes = sorted({(*module.weight.shape, module.group) for module in found})
    zeros, floats = found[0].zeros is not None, found[0].floats
    return [W4Products(shapes, partial(random_w4, zeros=zeros, floats=floats), tokens)]


def random_w4(shape: Shape, zeros: bool, floats: bool) -> W4:
    """A weight (outputs, inputs, group) of any codes."""
    outputs, inputs, group = shape
    words, groups, place = inputs // CODES_PER_WORD, -(-inputs // group), device()
    codes = torch.randint(-(2**31), 2**31, (outputs, words), device=place, dtype=torch.int64)
    scales = (torch.rand(outputs, groups, device=place) * 1e-2 + 1e-3).half()
    middle = torch.full((outputs, groups), 8, dtype=torch.uint8, device=place) if zeros else None
    factor = torch.ones(outputs, 1, device=place)
    return W4(codes.to(torch.int32), scales, factor, middle, group, floats)
