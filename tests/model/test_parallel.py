"""Two to four ranks compute what one does, whatever the widths, and other sizes are refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millrace.errors import ConfigError
from millrace.kernels.batch import Caches
from millrace.kernels.gemm import dequantize
from millrace.kernels.norm import add_rms_norm
from millrace.kernels.quantize import quantize
from millrace.kernels.sampling import best, token_of
from millrace.model.build import build_model
from millrace.model.build_context import BuildContext
from millrace.model.cache_spec import CacheOptions, RecordPart
from millrace.model.causal_lm import DraftHead
from millrace.model.config import read_config
from millrace.model.formats.fp8_block import Fp8BlockLinear
from millrace.model.formats.plain import PlainLinear
from millrace.model.parallel import NormResult, TensorParallel
from millrace.model.tiny import FP8_BLOCKS, QWEN3, UNIT_TEST, write_checkpoint
from millrace.model.vocabulary import VocabTable
from millrace.model.weight_format import Linear
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches, make_batch

SHAPE = replace(UNIT_TEST, num_heads=8, num_kv_heads=4, key_heads=4, value_heads=12, vocab_size=321)


WIDE = replace(SHAPE, fp8=True, head_dim=128, key_dim=128, value_dim=128)


class Meeting:
    """Ranks as threads of one process, which wait for each other at each collective."""

    def __init__(self, size: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.parts[rank] = x
        self.barrier.wait()
        parts = [part.clone() for part in self.parts]
        self.barrier.wait()
        return parts

    def sum(self, rank: int, x: Tensor) -> Tensor:
        return torch.stack(self.exchange(rank, x)).sum(0)

    def rank(self, rank: int, fused: bool = False, whole_experts: bool = False) -> TensorParallel:
        """fused: the all-reduce includes the residual add and the norm, as the GPU kernel does."""
        alone = TensorParallel(
            rank,
            len(self.parts),
            lambda x: self.sum(rank, x),
            lambda x: torch.cat(self.exchange(rank, x), dim=-1),
            whole_experts=whole_experts,
        )
        return (
            replace(alone, all_reduce_norm=partial(self.all_reduce_norm, rank)) if fused else alone
        )

    def all_reduce_norm(
        self,
        rank: int,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        keep: bool,
        quantized: bool,
    ) -> NormResult:
        normed, total = add_rms_norm(self.sum(rank, x), residual, weight, eps)
        return normed if keep else None, quantize(normed) if quantized else None, total


@pytest.mark.parametrize("size", [2, 3, 4])
def test_padding_of_the_vocabulary_is_never_chosen(tmp_path: Path, size: int) -> None:
    """All real logits are negative, those of padding 0; the best two are equal, ranks apart."""
    config = read_config(write_checkpoint(tmp_path / "model", SHAPE))
    meeting, cpu = Meeting(size), torch.device("cpu")
    hidden, row = torch.ones(1, config.hidden_size), torch.zeros(1, dtype=torch.int64)
    weight = -1.0 - torch.rand(321, config.hidden_size)
    weight[[37, 320]] = -0.5

    def one(rank: int) -> tuple[int, int]:
        build = BuildContext(config, meeting.rank(rank), torch.float32, cpu, keep_quantized=False)
        head = VocabTable(build, "lm_head.weight")
        share = weight[head.start : head.start + head.rows]
        head.weight.data.zero_()[: len(share)] = share
        with torch.inference_mode():
            found = best(head.local_logits(hidden), row.float(), row, row, head.start)
            return int(head.logits(hidden).argmax()), int(found)

    with ThreadPoolExecutor(size) as pool:
        both = list(pool.map(one, range(size)))
    assert {whole for whole, _ in both} == {37}
    assert token_of(torch.tensor([max(found for _, found in both)])).tolist() == [37]


def run(directory: Path, tp: TensorParallel, kept: bool = False) -> list[Tensor]:
    """Prefill, a verify row and the draft head, if any, on one rank: logits and hidden."""
    config = read_config(directory)
    model = build_model(config, dtype=torch.float32, tp=tp, mtp=True, keep_quantized=kept)
    load(model, directory)
    padding = model.embedding.weight[max(0, config.vocab_size - model.embedding.start) :]
    assert not bool(padding.any())
    driver = Driver(model, allocate_caches(model, 2, 30, drafts=1, ranks=tp.size))
    driver.admit(1)
    driver.admit(2)
    ids = [(11 * i) % config.vocab_size for i in range(70)]
    _, [prompt] = driver.step(prefill=[(1, ids[:66])])
    [verified], _ = driver.step(decode=[(1, ids[66:68])], padded=1)
    drafted = [] if model.mtp is None else draft(driver, model.mtp, ids, prompt)
    _, [prompt_end] = driver.step(prefill=[(2, ids)], ends=True)
    ends = model.logits(prompt_end[-1:])
    return [model.logits(prompt), model.logits(verified), *drafted, ends]


@torch.inference_mode()
def draft(driver: Driver, head: DraftHead, ids: list[int], prompt: Tensor) -> list[Tensor]:
    """The draft head's hidden vectors: at every token of slot 1's prompt, and at the last alone."""
    token, batch = make_batch(driver.caches, torch.tensor([0, 1, 0]), [], [(1, ids[1:66])])
    x = head.write_kv(token, prompt[:65], batch, driver.caches)
    _, last = make_batch(driver.caches, torch.tensor([0, 65, 0]), [(1, ids[65:66])], [])
    guessed = head.draft_hidden(x[-1:], last, driver.caches)
    drafted = head(token, prompt[:65], batch, driver.caches)
    torch.testing.assert_close(guessed, drafted[-1:], rtol=1e-5, atol=1e-5)
    return [drafted, guessed]


def on_ranks(
    directory: Path,
    size: int,
    kept: bool = False,
    fused: bool = False,
    whole_experts: bool = False,
) -> list[list[Tensor]]:
    """What `run` returns on each of `size` ranks."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = [meeting.rank(r, fused, whole_experts) for r in range(size)]
        runs = [pool.submit(run, directory, rank, kept) for rank in ranks]
        return [one.result(120) for one in runs]


def require_same(results: list[list[Tensor]], alone: list[Tensor], tolerance: float) -> None:
    for mine in results:
        for ours, expected, first in zip(mine, alone, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
            assert bool((ours == first).all()), "ranks must not disagree by a rounding"


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        pytest.param(2, {}, id="2"),
        pytest.param(4, {}, id="4"),
        pytest.param(2, {"intermediate_size": 104}, id="2-mlp-of-13-tiles"),
        pytest.param(4, {"intermediate_size": 100}, id="4-mlp-of-part-of-a-tile"),
        pytest.param(4, {"num_kv_heads": 2}, id="4-ranks-share-2-kv-heads"),
        pytest.param(4, {"num_kv_heads": 1, "intermediate_size": 56}, id="4-ranks-share-1-kv-head"),
        pytest.param(3, {"num_heads": 6, "num_kv_heads": 3, "key_heads": 6}, id="3"),
    ],
)
def test_ranks_agree_with_one(tmp_path: Path, size: int, changes: dict[str, int]) -> None:
    directory = write_checkpoint(tmp_path, replace(SHAPE, **changes))
    require_same(on_ranks(directory, size), run(directory, TensorParallel()), 1e-4)


def caches_after_a_prompt(directory: Path, tp: TensorParallel) -> Caches:
    model = build_model(read_config(directory), dtype=torch.float32, tp=tp)
    load(model, directory)
    driver = Driver(model, allocate_caches(model, 1, 20, ranks=tp.size))
    driver.admit(1)
    driver.step(prefill=[(1, [(11 * i) % 320 for i in range(70)])])
    return driver.caches


def recorded(caches: Caches, part: RecordPart) -> Tensor:
    """What slot 1 has of a part of a record; of pages all that are granted, in their order."""
    tensor: Tensor = getattr(caches.layers[int(part.layer.removeprefix("layers."))], part.name)
    if part.per_page:
        return tensor[caches.block_table[1].long()]
    return tensor[1, : part.shape[0]]


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 4), (4, 4), (4, 2)])
def test_a_rank_has_the_share_of_a_record_that_the_spec_names(
    tmp_path: Path, size: int, kv_heads: int
) -> None:
    directory = write_checkpoint(tmp_path, replace(SHAPE, num_kv_heads=kv_heads))
    options = CacheOptions("float32", "float32", "float32", 4, 20, 0, 16, draft_head=False)
    spec = read_config(directory).cache_spec(options)
    alone, meeting = caches_after_a_prompt(directory, TensorParallel()), Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        runs = [pool.submit(caches_after_a_prompt, directory, meeting.rank(r)) for r in range(size)]
        for rank, run_of_rank in enumerate(runs):
            mine = run_of_rank.result(120)
            for part, whole in zip(spec.record(rank, size), spec.record(), strict=True):
                expected, got = recorded(alone, whole), recorded(mine, part)
                assert got[0].nbytes == part.bytes if part.per_page else got.nbytes == part.bytes
                for axis, ranges in enumerate(part.share, start=int(part.per_page)):
                    pieces = [expected.narrow(axis, a, b - a) for a, b in ranges]
                    expected = torch.cat(pieces, dim=axis)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        pytest.param(2, {}, id="2"),
        pytest.param(4, {}, id="4-ranks-share-2-kv-heads"),
        pytest.param(4, {"tie_word_embeddings": False, "intermediate_size": 100}, id="4-untied"),
        pytest.param(5, {"num_attention_heads": 10, "num_key_value_heads": 5}, id="5"),
    ],
)
def test_ranks_of_qwen3_agree_with_one(tmp_path: Path, size: int, changes: dict[str, int]) -> None:
    directory = write_checkpoint(tmp_path, {**QWEN3, **changes})
    require_same(on_ranks(directory, size), run(directory, TensorParallel()), 1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_fp8_ranks_of_qwen3_agree_with_one(tmp_path: Path, size: int) -> None:
    """Shares of 3 blocks on 2 ranks, and heads of a block: nothing need be dequantized."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 128}
    config = {**QWEN3, **heads, "intermediate_size": 384, "hidden_size": 128}
    config |= {"num_hidden_layers": 2, "quantization_config": FP8_BLOCKS}
    directory = write_checkpoint(tmp_path, config)
    plain = run(directory, TensorParallel())
    require_same(on_ranks(directory, size), plain, 1e-4)
    rounding = mean_difference(run(directory, TensorParallel(), kept=True), plain)
    kept = on_ranks(directory, size, kept=True)
    assert 0 < mean_difference(kept[0], plain) < 1.5 * rounding
    require_same(kept, kept[0], 0.0)


@pytest.mark.parametrize("kept", [False, True])
def test_all_reduce_fused_with_the_norm(tmp_path: Path, kept: bool) -> None:
    directory = write_checkpoint(tmp_path, WIDE)
    apart = on_ranks(directory, 2, kept)
    require_same(on_ranks(directory, 2, kept, fused=True), apart[0], 1e-6)


def working(size: int, tmp_path: Path, **changes: int) -> str:
    config = read_config(write_checkpoint(tmp_path, replace(SHAPE, **changes)))
    with pytest.raises(ConfigError) as error:
        build_model(config, dtype=torch.float32, device="meta", tp=TensorParallel(0, size))
    return str(error.value)


def test_sizes_that_do_not_work(tmp_path: Path) -> None:
    start = "tensor_parallel_size {} cannot split "
    assert working(3, tmp_path) == start.format(3) + (
        "8 attention heads, 4 GDN key heads, 4 KV heads; sizes that work: 1, 2, 4"
    )
    assert working(8, tmp_path) == start.format(8) + (
        "4 GDN key heads, 12 GDN value heads; sizes that work: 1, 2, 4"
    )
    assert working(4, tmp_path, intermediate_size=24) == start.format(4) + (
        "intermediate_size 24 in tiles of 8; sizes that work: 1, 2"
    )


# --- FP8 weights -------------------------------------------------------------------------------


def dense(layer: Linear) -> Tensor:
    """A layer's weight in float32, from any dtype."""
    if isinstance(layer, Fp8BlockLinear):
        return dequantize(layer.weight, layer.weight_scale_inv)
    assert isinstance(layer, PlainLinear)
    return layer.weight.float()


def mlp_weights(directory: Path, tp: TensorParallel) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(gate, up, down of layer 0 on this rank, whether they stayed e4m3)."""
    model = build_model(read_config(directory), dtype=torch.float32, tp=tp, keep_quantized=True)
    load(model, directory)
    mlp = model.layers[0].mlp
    gate, up = dense(mlp.gate_up_proj).chunk(2)
    return gate, up, dense(mlp.down_proj), mlp.gate_up_proj.takes_fp8 and mlp.down_proj.takes_fp8


@pytest.mark.parametrize(
    ("intermediate", "size", "fp8"),
    [
        (256, 2, True),
        (384, 2, True),  # 2 blocks and 1
        (400, 2, True),  # the last block is a part of one
        (640, 4, True),
        (96, 2, False),  # less than a block a rank
    ],
)
def test_fp8_shares_are_the_weights(
    tmp_path: Path, intermediate: int, size: int, fp8: bool
) -> None:
    """Bit for bit: the ranks' shares together are the full weight; the rest is zeros."""
    directory = write_checkpoint(tmp_path, replace(WIDE, intermediate_size=intermediate))
    alone = mlp_weights(directory, TensorParallel())[:3]
    shares = [mlp_weights(directory, TensorParallel(rank, size)) for rank in range(size)]
    assert all(share[3] == fp8 for share in shares)
    for which, dim in ((0, 0), (1, 0), (2, 1)):
        cut = []
        for rank, share in enumerate(shares):
            unit = 128 if fp8 else 8
            start, stop, length = TensorParallel(rank, size).padded_share(intermediate, unit)
            assert share[which].shape[dim] == length
            kept, padding = share[which].split([stop - start, length - stop + start], dim)
            assert not bool(padding.any())
            cut.append(kept)
        assert torch.equal(torch.cat(cut, dim), alone[which])


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        pytest.param(2, {"intermediate_size": 384}, id="whole-heads"),
        pytest.param(4, {"intermediate_size": 400, "num_kv_heads": 2}, id="shared-kv-heads"),
        pytest.param(2, {"head_dim": 64, "key_dim": 32, "value_dim": 64}, id="heads-cut-blocks"),
    ],
)
def test_fp8_ranks_agree_with_one(tmp_path: Path, size: int, changes: dict[str, int]) -> None:
    """Activations are quantized too, and a few round differently: close on average."""
    directory = write_checkpoint(tmp_path, replace(WIDE, **changes))
    plain = run(directory, TensorParallel())
    rounding = mean_difference(run(directory, TensorParallel(), kept=True), plain)
    ranks = on_ranks(directory, size, kept=True)
    require_same(ranks, ranks[0], 0.0)
    assert 0.0 < rounding < 0.3
    assert mean_difference(ranks[0], plain) < 1.5 * rounding
    require_same(on_ranks(directory, size), plain, 1e-4)


def mean_difference(ours: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(ours, expected, strict=True)
    return max(float((one - other).abs().mean()) for one, other in pairs)
