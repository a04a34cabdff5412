"""Runs a step's decode rows and prefill rows with their own kernels, overlapped on a GPU.

It knows streams and the rows of a batch, not what is computed for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, DecodeRows, PrefillRows


def decode_and_prefill(
    batch: Batch,
    decode: Callable[[DecodeRows], Tensor],
    prefill: Callable[[PrefillRows], Tensor],
) -> Tensor:
    """[T, ...]: the result of `decode` for the decode rows, then of `prefill` for the prefill rows.

    Decode rows are bound by memory, a few prompts by a chain of small GEMMs; so on a GPU both run
    at once. The prompts' stream has the higher priority: their blocks are few and depend on each
    other, those of decode rows are many and short.
    """
    if batch.prefill is None:
        assert batch.decode is not None
        return decode(batch.decode)
    if batch.decode is None:
        return prefill(batch.prefill)
    device = batch.positions.device
    if device.type != "cuda":
        return torch.cat([decode(batch.decode), prefill(batch.prefill)])
    # The streams wait for each other here and below, so neither reuses memory that is still read.
    main, side = torch.cuda.current_stream(device), _prefill_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        prefilled = prefill(batch.prefill)
    decoded = decode(batch.decode)
    main.wait_stream(side)
    return torch.cat([decoded, prefilled])


@functools.cache
def _prefill_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
