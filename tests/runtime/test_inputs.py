"""From plans to tensors: what kernels ask of them."""

from __future__ import annotations

import pytest
import torch

from millrace.protocol import Chunk
from millrace.runtime.inputs import _prefill_rows


@pytest.mark.parametrize("prompts", [1, 2, 3, 7])
def test_rows_of_prompts_begin_where_kernels_are_compiled_for(prompts: int) -> None:
    """Triton compiles a kernel once more for pointers that are no multiple of 16 bytes."""
    chunks = [Chunk(slot, 10 * slot, slot, last=True) for slot in range(1, prompts + 1)]
    rows = _prefill_rows(chunks, torch.device("cpu"))
    assert rows.slots.tolist() == [*range(1, prompts + 1)]
    assert rows.starts.tolist() == [10 * slot for slot in range(1, prompts + 1)]
    assert rows.offsets.diff().tolist() == rows.slots.tolist()
    for tensor in (rows.slots, rows.starts, rows.offsets):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0
