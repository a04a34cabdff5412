"""What linear layers get as inputs when a model reads a text: the Hessians of GPTQ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, Caches, PrefillRows
from millrace.model.cache_spec import CacheOptions
from millrace.model.causal_lm import CausalLM
from millrace.model.formats.plain import PlainLinear
from millrace.model.parameter import pieces_of
from millrace.runtime.step.caches import allocate_caches

PAGE = 64
MOST_BYTES = 4 << 30  # of Hessians at once; for more layers the text is read again


def hessians(
    model: CausalLM, names: set[str], prompts: Sequence[list[int]]
) -> Iterator[dict[str, Tensor]]:
    """For some layers at a time, by the names of their modules: the sum of x x^T, float32 [K, K].

    names: the modules that are wanted; experts have none. prompts: token ids; all are read for each
    part of the layers.
    """
    for part in _parts(model, names):
        sums = {name: torch.zeros(n.inputs, n.inputs) for name, n in part.items()}
        hooks = [
            layer.register_forward_pre_hook(_adder(sums[name])) for name, layer in part.items()
        ]
        try:
            for prompt in prompts:
                read(model, prompt)
        finally:
            for hook in hooks:
                hook.remove()
        yield {
            piece.module: sums[name]
            for name, layer in part.items()
            for piece in pieces_of(layer.weight)
            if piece.module in names
        }


def _parts(model: CausalLM, names: set[str]) -> Iterator[dict[str, PlainLinear]]:
    part: dict[str, PlainLinear] = {}
    size = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, PlainLinear):
            continue
        if not names & {piece.module for piece in pieces_of(layer.weight)}:
            continue
        size += 4 * layer.inputs**2
        if part and size > MOST_BYTES:
            yield part
            part, size = {}, 4 * layer.inputs**2
        part[name] = layer
    if part:
        yield part


def _adder(total: Tensor) -> Any:
    def add(_: object, given: tuple[Tensor, ...]) -> None:
        x = given[0].float()
        total.add_(x.t() @ x)

    return add


@torch.inference_mode()
def read(model: CausalLM, prompt: list[int]) -> Tensor:
    """The hidden vectors [T, H] of a prompt on a CPU."""
    caches = _caches(model, len(prompt))
    slots, positions = torch.ones(len(prompt), dtype=torch.int64), torch.arange(len(prompt))
    rows = PrefillRows(
        torch.tensor([1]), torch.tensor([0]),
        torch.tensor([0, len(prompt)], dtype=torch.int32), (len(prompt),), (0,),
    )  # fmt: skip
    batch = Batch(slots, positions, caches.kv_rows(slots, positions), None, rows)
    found: Tensor = model(torch.tensor(prompt), batch, caches)
    return found


def _caches(model: CausalLM, length: int) -> Caches:
    """Of one sequence, zeros."""
    dtype, pages = str(next(model.parameters()).dtype).removeprefix("torch."), -(-length // PAGE)
    options = CacheOptions(
        dtype, dtype, "float32", PAGE, pages, 0, 16, draft_head=model.mtp is not None
    )
    caches = allocate_caches(model.config.cache_spec(options), slots=2, pages=1 + pages, ranks=1)
    caches.block_table[1] = torch.arange(1, 1 + pages, dtype=torch.int32)
    return caches
