"""Splits the memory of one rank into slots, pages and snapshots, or says clearly why it is too
small.

Pure arithmetic on bytes: the worker measures and allocates. Slots come first (max_num_seqs of them,
each a recurrent state with its window). Then come the pages of at least one longest sequence, then
snapshots up to a share of what is left, then pages with the rest. A model without recurrent states
has no snapshots: its cached prefixes are pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from millrace.errors import ConfigError

SNAPSHOT_SHARE = 0.25
SNAPSHOTS_PER_SEQUENCE = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes on one rank: of a page (all layers), of a slot, of a snapshot (0: there are none)."""

    page: int
    slot: int
    snapshot: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What is allocated. num_pages counts the null page."""

    num_pages: int
    num_snapshots: int
    bytes: int


def plan_memory(
    budget: int,
    costs: Costs,
    *,
    max_num_seqs: int,
    max_model_len: int,
    page_size: int,
    pages_per_request: int,
    num_snapshots: int | None,
    prefix_caching: bool,
) -> MemoryPlan:
    """Split `budget` bytes. num_snapshots: the number asked for; None: a share of the memory.

    Raises ConfigError with the option that is too large and the value that fits.
    """
    slots = (max_num_seqs + 1) * costs.slot
    least = (pages_per_request + 1) * costs.page
    if slots + least > budget:
        raise ConfigError(
            _refusal(budget, costs, max_num_seqs, max_model_len, page_size, pages_per_request)
        )
    rest = budget - slots - least
    snapshots = 0
    if prefix_caching and costs.snapshot:
        snapshots = _snapshots(rest, costs, max_num_seqs, num_snapshots)
    rest -= snapshots * costs.snapshot
    useful = _useful_pages(costs, max_num_seqs, pages_per_request, snapshots, prefix_caching)
    pages = min(pages_per_request + 1 + rest // costs.page, useful)
    total = slots + pages * costs.page + snapshots * costs.snapshot
    return MemoryPlan(pages, snapshots, total)


def enough_memory(
    costs: Costs, *, max_num_seqs: int, pages_per_request: int, num_snapshots: int | None
) -> int:
    """Bytes with which every sequence can have its full length, and as many snapshots as are
    useful; without snapshots, pages of as many longest prefixes as there are sequences."""
    useful = SNAPSHOTS_PER_SEQUENCE * max_num_seqs
    snapshots = useful if num_snapshots is None else num_snapshots
    longest = max_num_seqs if costs.snapshot else 2 * max_num_seqs
    pages = pages_per_request * longest + 1
    return (max_num_seqs + 1) * costs.slot + pages * costs.page + snapshots * costs.snapshot


def _useful_pages(
    costs: Costs, max_num_seqs: int, pages_per_request: int, snapshots: int, prefix_caching: bool
) -> int:
    """More pages than this are useless: all sequences at full length, and all cached prefixes."""
    prefixes = snapshots
    if prefix_caching and not costs.snapshot:
        prefixes = SNAPSHOTS_PER_SEQUENCE * max_num_seqs
    return pages_per_request * (max_num_seqs + prefixes) + 1


def _snapshots(rest: int, costs: Costs, max_num_seqs: int, wanted: int | None) -> int:
    if wanted is not None:
        if wanted * costs.snapshot > rest:
            raise ConfigError(
                f"num_snapshots {wanted} needs {_gib(wanted * costs.snapshot)}, but "
                f"{_gib(rest)} is left; at most {rest // costs.snapshot} fit"
            )
        return wanted
    share = int(rest * SNAPSHOT_SHARE) // costs.snapshot
    return min(share, SNAPSHOTS_PER_SEQUENCE * max_num_seqs)


def _refusal(
    budget: int,
    costs: Costs,
    max_num_seqs: int,
    max_model_len: int,
    page_size: int,
    pages_per_request: int,
) -> str:
    least = (pages_per_request + 1) * costs.page
    fitting_seqs = (budget - least) // costs.slot - 1
    have = f"{_gib(budget)} is available for states and pages"
    if fitting_seqs >= 1:
        return (
            f"max_num_seqs {max_num_seqs} needs {_gib((max_num_seqs + 1) * costs.slot)} of states "
            f"besides the pages of one sequence, but {have}; at most {fitting_seqs} fit"
        )
    left = budget - 2 * costs.slot
    fitting_len = max(0, left // costs.page - 1) * page_size - (
        pages_per_request * page_size - max_model_len
    )
    if fitting_len >= page_size:
        return (
            f"max_model_len {max_model_len} needs {_gib(least)} of pages for one sequence, but "
            f"{have}; at most {fitting_len} fit with max_num_seqs 1"
        )
    return (
        f"{have}, too little for a single sequence: one state takes {_gib(costs.slot)}; "
        "give more memory (gpu_memory_utilization, kv_cache_memory_bytes)"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
