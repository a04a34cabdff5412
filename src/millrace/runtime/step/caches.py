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

    def layer(cache: LayerCache) -> KVCache | GDNState:
        tensors = {buffer.name: zeros(pages, buffer) for buffer in cache.per_page}
        for buffer in cache.per_slot:
            tensors[buffer.name] = next(stacked[buffer.name])
        return LAYERS[cache.kind](**tensors)

    layers = [layer(cache) for cache in spec.layers]
    draft = None if spec.draft is None else layer(spec.draft)
    assert draft is None or isinstance(draft, KVCache)
    index = {buffer.name: zeros(slots, buffer) for buffer in spec.index}
    return Caches(layers, stacks, windows, draft, **index, page_size=spec.options.page_size)


def tensors_of(caches: Caches) -> Iterator[Tensor]:
    """Every tensor, each memory once: stacks, not their parts."""
    yield from caches.stacks.values()
    yield from caches.windows.values()
    for cache in [*caches.layers, caches.mtp]:
        if cache is not None:
            fields = {name: getattr(cache, name) for name in cache.__slots__}
            known = caches.stacks | caches.windows
            yield from (tensor for name, tensor in fields.items() if name not in known)
    yield from (caches.block_table, caches.fill, caches.conv_offset)
