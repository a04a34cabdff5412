"""The two kinds of rows of a step, each by its own kernels, side by side where that pays.

Knows streams and which rows a batch holds, not what runs over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, DecodeRows, PrefillRows


def each_kind(
    batch: Batch,
    decode: Callable[[DecodeRows], Tensor],
    prefill: Callable[[PrefillRows], Tensor],
) -> Tensor:
    """[T, ...]: what `decode` gives for the decode rows' tokens, then `prefill` for the others'.

    Decode rows wait for memory, a few prompts for a chain of small products, so on a GPU both run
    at once. The prompts' stream goes first where both want a multiprocessor: their blocks are few
    and depend on each other, those of decode rows are many and short.
    """
    if batch.prefill is None:
        assert batch.decode is not None
        return decode(batch.decode)
    if batch.decode is None:
        return prefill(batch.prefill)
    device = batch.positions.device
    if device.type != "cuda":
        return torch.cat([decode(batch.decode), prefill(batch.prefill)])
    # Both streams meet here and below, so neither reuses memory that the other still reads.
    main, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(main)
    with torch.cuda.stream(aside):
        behind = prefill(batch.prefill)
    front = decode(batch.decode)
    main.wait_stream(aside)
    return torch.cat([front, behind])


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
