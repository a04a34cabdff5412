"""The state of each running request on the device: one row per slot, stable for the request's life.

The token table is the tape of a sequence: every known token by position, then the drafts that are
not verified yet. A step gathers its inputs from it and writes its outputs to it, so sampled tokens
feed the next step without the host. Row 0 is the null slot, which padded rows use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import torch
from torch import Tensor

from millrace.kernels.sampling import NOT_FINITE
from millrace.protocol import MAX_STOP_IDS, Admission, PageGrant
from millrace.runtime.step.upload import upload

METHOD = 16  # more than there are drafts of a row


@dataclass(slots=True)
class Slots:
    """Device rows. N = max_num_seqs + 1.

    tokens: int64 [N, max_len + spare]. length: int64 [N], tokens in the caches. ended: bool [N].
    max_total: int64 [N]. stop_ids: int64 [N, 17], NOT_FINITE first, padded with -1. temperature,
    top_p: float32 [N]. top_k: int64 [N], 0 keeps all. seed: int64 [N]. methods: int64 [N], those
    that draft for the request, a bit each. drafted: int64 [N], how many drafts the tape has behind
    the last token, and METHOD times the number of the method that made them.
    """

    tokens: Tensor
    length: Tensor
    ended: Tensor
    max_total: Tensor
    stop_ids: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    seed: Tensor
    methods: Tensor
    drafted: Tensor

    @classmethod
    def allocate(
        cls, max_num_seqs: int, max_len: int, drafts: int, device: torch.device | str
    ) -> Slots:
        """Empty rows. The tape has room for the drafts beyond the longest sequence."""
        rows = max_num_seqs + 1

        def full(value: float, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        return cls(
            tokens=full(0, tape_length(max_len, drafts)),
            length=full(0),
            ended=full(1, dtype=torch.bool),
            max_total=full(0),
            stop_ids=full(NOT_FINITE, 1 + MAX_STOP_IDS),
            temperature=full(0.0, dtype=torch.float32),
            top_p=full(1.0, dtype=torch.float32),
            top_k=full(0),
            seed=full(0),
            methods=full(0),
            drafted=full(0),
        )

    def tensors(self) -> Iterator[Tensor]:
        yield from (getattr(self, field.name) for field in fields(self))

    @classmethod
    def row_bytes(cls, max_len: int, drafts: int) -> int:
        """Bytes of one row, as `allocate` makes it."""
        row = cls.allocate(0, max_len, drafts, "meta")
        return sum(tensor.nbytes for tensor in row.tensors())

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Write the rows of new requests."""
        device = self.length.device
        self._write_tapes(admissions)
        stops = [
            [NOT_FINITE, *a.stop_token_ids] + [-1] * (MAX_STOP_IDS - len(a.stop_token_ids))
            for a in admissions
        ]
        integers = [
            [a.slot, a.start, a.max_total, a.top_k, a.seed, a.methods, *stop]
            for a, stop in zip(admissions, stops, strict=True)
        ]
        table = upload(integers, device)
        reals = [[a.temperature, a.top_p] for a in admissions]
        sampling = upload(reals, device, torch.float32)
        slots = table[:, 0]
        self.length[slots] = table[:, 1]
        self.max_total[slots] = table[:, 2]
        self.top_k[slots] = table[:, 3]
        self.seed[slots] = table[:, 4]
        self.methods[slots] = table[:, 5]
        self.stop_ids[slots] = table[:, 6:]
        self.drafted.index_fill_(0, slots, 0)
        self.temperature[slots] = sampling[:, 0]
        self.top_p[slots] = sampling[:, 1]
        self.ended.index_fill_(0, slots, False)

    def _write_tapes(self, admissions: Sequence[Admission]) -> None:
        flat = upload(list(chain.from_iterable(a.tokens for a in admissions)), self.length.device)
        at = 0
        for a in admissions:
            self.tokens[a.slot, : len(a.tokens)] = flat[at : at + len(a.tokens)]
            at += len(a.tokens)


def tape_length(max_len: int, drafts: int) -> int:
    """Tokens of a row of the tape."""
    return max_len + 2 * (drafts + 1)


def grant_pages(
    block_table: Tensor, admissions: Sequence[Admission], grants: Sequence[PageGrant]
) -> None:
    """Clear new requests' block tables and append granted pages. block_table: int32 [N, P]."""
    device = block_table.device
    if admissions:
        block_table.index_fill_(0, upload([a.slot for a in admissions], device), 0)
    if grants:
        places = [
            [grant.slot, grant.first + offset, page]
            for grant in grants
            for offset, page in enumerate(grant.pages)
        ]
        table = upload(places, device)
        block_table[table[:, 0], table[:, 1]] = table[:, 2].to(torch.int32)
