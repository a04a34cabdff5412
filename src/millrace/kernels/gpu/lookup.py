"""Looking up a sequence's last tokens in one pass over it. See `millrace.kernels.lookup`.

A row is cut into parts, a program each, and a part into blocks. Nearly all positions differ in the
first token that is compared, so a block goes further back only while one of its positions agrees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
MOST_PARTS = 16


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["slots", "ends", "found"])
def _match_kernel(
    tokens, slots, ends, found, stride, parts, LONGEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    slot, end = tl.load(slots + row), tl.load(ends + row)
    tape = tokens + slot * stride
    count = end - 1  # positions at which a match may end: all before the last token
    each = (count + parts - 1) // parts
    first = part * each
    stop = tl.minimum(first + each, count)
    last = tl.load(tape + count)
    best = tl.full([BLOCK], 0, tl.int64)
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        alive = (tl.load(tape + at, mask=at < stop, other=-1) == last) & (at < stop)
        length = alive.to(tl.int64)
        back = 1
        going = tl.max(alive.to(tl.int32), axis=0)
        while (going > 0) & (back < LONGEST):
            here = alive & (at >= back)
            wanted = tl.load(tape + tl.maximum(count - back, 0))
            alive = here & (tl.load(tape + at - back, mask=here, other=-1) == wanted)
            length += alive.to(tl.int64)
            going = tl.max(alive.to(tl.int32), axis=0)
            back += 1
        best = tl.maximum(best, tl.where(length > 0, (length << 32) | (at + 1), 0))
    tl.atomic_max(found + row, tl.max(best, axis=0))


def longest_match(
    tokens: Tensor, slots: Tensor, ends: Tensor, longest: int, context: int
) -> Tensor:
    found = torch.zeros_like(ends)
    if context < 2 or not slots.numel():
        return found
    parts = max(1, min(MOST_PARTS, context // (2 * BLOCK)))
    _match_kernel[(slots.shape[0], parts)](
        tokens, slots, ends, found, tokens.stride(0), parts, LONGEST=longest, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return found
