"""The memory that is allocated has the bytes that the spec says, for any model and any rank."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.kernels.batch import GDNState, KVCache
from millrace.model.cache_spec import CacheOptions
from millrace.model.config import ModelConfig
from millrace.model.formats.plain import UNQUANTIZED
from millrace.runtime.step.caches import allocate_caches, tensors_of
from millrace.runtime.step.slots import Slots
from millrace.runtime.step.snapshots import Snapshots

BASE = ModelConfig(
    family="", hidden_size=64, intermediate_size=64, layer_types=(), num_heads=8, num_kv_heads=2,
    head_dim=16, rotary_dim=8, rope_theta=1e4, rope_scaling=None, key_heads=4, value_heads=4,
    key_dim=16, value_dim=16, vocab_size=32, tied=True, eps=1e-6, max_positions=64, eos_ids=(),
    mtp_layers=1, dtype="float32", quantization=UNQUANTIZED, nested=False,
)  # fmt: skip

configs = st.builds(
    lambda layers, kv, ratio, **changes: dataclasses.replace(
        BASE, layer_types=tuple(layers), num_kv_heads=kv, value_heads=4 * ratio, **changes
    ),
    layers=st.lists(st.sampled_from(["full_attention", "linear_attention"]), max_size=6),
    kv=st.sampled_from([1, 2, 4, 8]),
    ratio=st.integers(1, 3),
    hidden_size=st.sampled_from([32, 96]),
    head_dim=st.sampled_from([16, 32]),
    key_dim=st.sampled_from([16, 48]),
    value_dim=st.sampled_from([16, 32]),
)
choices = st.builds(
    CacheOptions,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    kv_dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
    state_dtype=st.sampled_from(["float32", "bfloat16"]),
    page_size=st.sampled_from([1, 4, 16]),
    max_pages=st.integers(1, 9),
    drafts=st.integers(0, 5),
    window=st.integers(16, 18),
    draft_head=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    config=configs,
    options=choices,
    ranks=st.sampled_from([1, 2, 4]),
    slots=st.integers(1, 5),
    pages=st.integers(1, 7),
    snapshots=st.integers(0, 3),
)
def test_bytes_are_those_predicted(
    config: ModelConfig, options: CacheOptions, ranks: int, slots: int, pages: int, snapshots: int
) -> None:
    spec = config.cache_spec(options)
    # On the meta device nothing is allocated, but every tensor has its size.
    caches = allocate_caches(spec, slots=slots, pages=pages, ranks=ranks, device="meta")
    taken = sum(tensor.nbytes for tensor in tensors_of(caches))
    assert taken == slots * spec.slot_bytes(ranks) + pages * spec.page_bytes(ranks)
    pool = Snapshots.allocate(spec, snapshots, ranks, device="meta")
    assert sum(t.nbytes for t in pool.tensors()) == snapshots * spec.snapshot_bytes(ranks)
    tape = Slots.allocate(slots - 1, 100, options.drafts, "meta")
    assert sum(t.nbytes for t in tape.tensors()) == slots * Slots.row_bytes(100, options.drafts)


@settings(max_examples=30, deadline=None)
@given(config=configs, options=choices)
def test_layers_are_parts_of_the_stacks(config: ModelConfig, options: CacheOptions) -> None:
    """What one copy saves is what the layers read and write."""
    caches = allocate_caches(config.cache_spec(options), slots=3, pages=2)
    deltas = [layer for layer in caches.layers if isinstance(layer, GDNState)]
    attention = [layer for layer in [*caches.layers, caches.mtp] if isinstance(layer, KVCache)]
    assert len(caches.kv) == bool(attention)  # all have one form
    for i, layer in enumerate(attention):
        raw = caches.kv[0].view(torch.uint8)
        raw[2 * i, 1], raw[2 * i + 1, 1] = i + 1, 100 + i
        assert torch.all(layer.keys.view(torch.uint8)[1] == i + 1)
        assert torch.all(layer.values.view(torch.uint8)[1] == 100 + i)
        assert torch.all(layer.values.view(torch.uint8)[0] == 0)
    for i, layer in enumerate(deltas):
        caches.stacks["state"][i, 1] = i + 1
        caches.stacks["conv"][i, 2] = i + 1
        assert torch.all(layer.state[1] == i + 1)
        assert torch.all(layer.conv[2] == i + 1)
        assert torch.all(layer.state[2] == 0)
