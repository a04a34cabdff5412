"""How the memory there is becomes slots, pages and snapshots; and a clear refusal where it cannot.

Pure arithmetic over bytes: the worker measures and allocates. Slots come first (each is a recurrent
state with its window, and max_num_seqs says how many), then pages for at least one longest
sequence, then snapshots up to a share of what is left, then pages with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from millrace.errors import ConfigError

SNAPSHOT_SHARE = 0.25
SNAPSHOTS_PER_SEQUENCE = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes on one rank: of a page (all layers), of a slot's rows, of a snapshot."""

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
    """Split `budget` bytes. num_snapshots: as many as asked for, or None for a share.

    Raises ConfigError naming the option that is too large and the value that fits.
    """
    slots = (max_num_seqs + 1) * costs.slot
    least = (pages_per_request + 1) * costs.page
    if slots + least > budget:
        raise ConfigError(
            _refusal(budget, costs, max_num_seqs, max_model_len, page_size, pages_per_request)
        )
    rest = budget - slots - least
    snapshots = _snapshots(rest, costs, max_num_seqs, num_snapshots) if prefix_caching else 0
    rest -= snapshots * costs.snapshot
    # Beyond this many pages nothing can use them: every sequence at its longest, and each snapshot.
    useful = pages_per_request * (max_num_seqs + snapshots) + 1
    pages = min(pages_per_request + 1 + rest // costs.page, useful)
    total = slots + pages * costs.page + snapshots * costs.snapshot
    return MemoryPlan(pages, snapshots, total)


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
    have = f"{_gib(budget)} is there for states and pages"
    if fitting_seqs >= 1:
        return (
            f"max_num_seqs {max_num_seqs} needs {_gib((max_num_seqs + 1) * costs.slot)} of states "
            f"beside one sequence's pages, but {have}; at most {fitting_seqs} fit"
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
        f"{have}, which holds no sequence at all: one state takes {_gib(costs.slot)}; "
        "give more memory (gpu_memory_utilization, kv_cache_memory_bytes)"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
