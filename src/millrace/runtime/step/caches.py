"""The tensors of a `CacheSpec`, for one rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from millrace.kernels.batch import Caches, GDNState, KVCache
from millrace.model.cache_spec import Buffer, CacheSpec, LayerCache

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
}
LAYERS: dict[str, type[KVCache] | type[GDNState]] = {"attention": KVCache, "gated_delta": GDNState}


def allocate_caches(
    spec: CacheSpec,
    *,
    slots: int,
    pages: int,
    ranks: int = 1,
    device: torch.device | str = "cpu",
) -> Caches:
    """Zeroed memory of every layer. slots, pages: how many, with the null ones."""

    def zeros(count: int, buffer: Buffer, *layers: int) -> Tensor:
        shape = (*layers, count, *buffer.shape(ranks))
        return torch.zeros(shape, dtype=DTYPES[buffer.dtype], device=device)

    stacks = {name: zeros(slots, same[0], len(same)) for name, same in spec.stacks().items()}
    windows = {name: zeros(slots, same[0], len(same)) for name, same in spec.windows().items()}
    stacked: dict[str, Iterator[Tensor]] = {
        name: iter(each) for name, each in (stacks | windows).items()
    }
    kv = {form: zeros(pages, buffer, count) for form, (buffer, count) in spec.page_forms().items()}
    paged = {form: iter(stack) for form, stack in kv.items()}

    def layer(cache: LayerCache) -> KVCache | GDNState:
        tensors = {buffer.name: next(paged[buffer.form]) for buffer in cache.per_page}
        for buffer in cache.per_slot:
            tensors[buffer.name] = next(stacked[buffer.name])
        return LAYERS[cache.kind](**tensors)

    layers = [layer(cache) for cache in spec.layers]
    draft = None if spec.draft is None else layer(spec.draft)
    assert draft is None or isinstance(draft, KVCache)
    drafting = [drawn for cache in spec.draft_model if isinstance(drawn := layer(cache), KVCache)]
    index = {buffer.name: zeros(slots, buffer) for buffer in spec.index}
    size = spec.options.page_size
    kept = list(kv.values())
    return Caches(
        layers, stacks, windows, kept, draft, **index, page_size=size, draft_layers=drafting
    )


def tensors_of(caches: Caches) -> Iterator[Tensor]:
    """Every tensor, each memory once: stacks, not their parts."""
    yield from caches.stacks.values()
    yield from caches.windows.values()
    yield from caches.kv
    yield from (caches.block_table, caches.fill, caches.conv_offset)
