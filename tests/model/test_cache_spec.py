"""Bytes of the layers' memory, counted by hand; records, and their shares on ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.model.cache_spec import Axis, CacheOptions, CacheSpec
from millrace.model.config import ModelConfig
from millrace.model.parallel import TensorParallel
from tests.model.test_config import CONFIG_27B_FP8, read

OPTIONS = CacheOptions(
    "bfloat16", "bfloat16", "float32", page_size=1, max_pages=1, drafts=0, window=0,
    draft_head=False,
)  # fmt: skip
INDEX = 3 * 4  # bytes of a slot's index with one page


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read(tmp_path_factory.mktemp("27b"), CONFIG_27B_FP8)


def spec(config: ModelConfig, **changes: object) -> CacheSpec:
    return config.cache_spec(dataclasses.replace(OPTIONS, **changes))  # type: ignore[arg-type]


def test_27b_pages(config: ModelConfig) -> None:
    assert spec(config).page_bytes() == 65_536
    assert spec(config, page_size=16).page_bytes() == 16 * 65_536
    assert spec(config, kv_dtype="float8_e4m3fn").page_bytes() == 32_768
    assert spec(config, draft_head=True).page_bytes() == 65_536 + 4_096
    assert spec(config).page_bytes(ranks=4) == 65_536 // 4
    assert spec(config).page_bytes(ranks=8) == 65_536 // 4  # two ranks have the same head


def test_27b_slots_and_snapshots(config: ModelConfig) -> None:
    state, conv = 150_994_944, 2_949_120
    assert spec(config).slot_bytes() == state + conv + INDEX
    assert spec(config, state_dtype="bfloat16").slot_bytes(2) == (state // 2 + conv) // 2 + INDEX
    rows = 48 * (16 * 128 * 2 + 48 * 129 * 4)  # a window row: k in bfloat16; u and log A in float32
    assert spec(config, window=16).slot_bytes() == state + conv + 16 * rows + INDEX
    # Drafts make the convolution remember more inputs, of which a record keeps none.
    drafting = spec(config, drafts=3, window=16, draft_head=True)
    assert drafting.slot_bytes() == state + 2 * conv + 16 * rows + INDEX
    assert drafting.snapshot_bytes() == state + conv + 2 * 5120
    assert spec(config).snapshot_bytes() == state + conv


def test_a_record_lists_every_layer(config: ModelConfig) -> None:
    found = spec(config, drafts=1, window=16, draft_head=True, page_size=16).record()
    kinds = Counter((part.kind, part.per_page) for part in found)
    assert kinds == {
        ("kv", True): 2 * 17, ("state", False): 48, ("conv", False): 48, ("hidden", False): 1
    }  # fmt: skip
    keys = next(part for part in found if part.layer == "layers.3")
    assert (keys.name, keys.dtype, keys.bytes) == ("keys", "bfloat16", 16 * 4 * 256 * 2)
    assert keys.layout == ("token", "head", "dim")
    assert keys.shape == (16, 4, 256)
    assert [part.layer for part in found[-3:]] == ["draft", "draft", "model"]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shares_of_ranks_cover_the_whole_model(config: ModelConfig, ranks: int) -> None:
    whole = spec(config, draft_head=True)
    parts = [whole.record(rank, ranks) for rank in range(ranks)]
    for full, *split in zip(whole.record(), *parts, strict=True):
        for axis, ranges in enumerate(full.share):
            covered = {i for part in split for a, b in part.share[axis] for i in range(a, b)}
            assert covered == {i for a, b in ranges for i in range(a, b)}
        for part in split:
            assert [sum(b - a for a, b in ranges) for ranges in part.share] == list(part.shape)


@given(ranks=st.sampled_from([1, 2, 4, 8]), heads=st.sampled_from([1, 2, 4, 8]))
def test_heads_are_shared_as_the_weights_are(ranks: int, heads: int) -> None:
    axis = Axis("head", (heads,), split=True)
    for rank in range(ranks):
        assert axis.share(rank, ranks) == (TensorParallel(rank, ranks).kv_share(heads),)


def test_only_pages_and_nothing_else_need_no_snapshots(config: ModelConfig) -> None:
    attention = dataclasses.replace(config, layer_types=("full_attention",) * 2)
    assert not spec(attention).needs_snapshots
    assert spec(attention, draft_head=True).needs_snapshots  # of the hidden vector
    assert spec(config).needs_snapshots
