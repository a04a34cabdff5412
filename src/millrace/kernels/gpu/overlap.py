"""Runs a step's decode rows and prefill rows with their own kernels, overlapped on a GPU.

It knows streams and the rows of a batch, not what is computed for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from millrace.kernels.batch import Batch, DecodeRows, PrefillRows


def decode_and_prefill(
    batch: Batch,
    decode: Callable[[DecodeRows], object],
    prefill: Callable[[PrefillRows], object],
) -> None:
    """Launch both kinds of rows on a GPU; they write to memory that is there already.

    Decode rows are bound by memory, a few prompts by a chain of small GEMMs; so both run at once.
    The prompts' stream has the higher priority: their blocks are few and depend on each other,
    those of decode rows are many and short.
    """
    if batch.prefill is None:
        assert batch.decode is not None
        decode(batch.decode)
        return
    if batch.decode is None:
        prefill(batch.prefill)
        return
    device = batch.positions.device
    if device.type != "cuda":  # the kernels in Triton's interpreter
        decode(batch.decode)
        prefill(batch.prefill)
        return
    # The streams wait for each other here and below, so neither reuses memory that is still read.
    main, side = torch.cuda.current_stream(device), _prefill_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        prefill(batch.prefill)
    decode(batch.decode)
    main.wait_stream(side)


@functools.cache
def _prefill_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
