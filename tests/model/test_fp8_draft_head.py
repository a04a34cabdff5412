"""The FP8 output head for drafts: close to the exact one, and never a padding token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from millrace.kernels.gemm import dequantize
from millrace.kernels.quantize import quantize
from millrace.model import vocabulary
from millrace.model.build import build_model
from millrace.model.build_context import BuildContext
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.parallel import TensorParallel
from millrace.model.parameter import pieces_of
from millrace.model.tiny import UNIT_TEST, write_checkpoint
from millrace.model.vocabulary import Fp8DraftHead, VocabTable
from millrace.model.weights import load, random_weights

SHAPES = [replace(UNIT_TEST, vocab_size=321, tied=tied) for tied in (True, False)]


def built(directory: Path, **options: bool | None) -> CausalLM:
    return build_model(read_config(directory), dtype=torch.float32, **options)  # type: ignore[arg-type]


def rounded_head(model: CausalLM) -> Fp8DraftHead:
    assert isinstance(model.draft_output, Fp8DraftHead)
    return model.draft_output


@pytest.mark.parametrize("shape", SHAPES, ids=["tied", "untied"])
@pytest.mark.parametrize("dummy", [False, True])
def test_logits_are_those_of_the_head_but_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: object, dummy: bool
) -> None:
    """From a checkpoint and from random weights; quantized at once or in parts."""
    directory = write_checkpoint(tmp_path, shape, tokenizer=False)  # type: ignore[arg-type]
    model = built(directory, mtp=True, draft_fp8=True)
    random_weights(model, 3) if dummy else load(model, directory)
    head, hidden = rounded_head(model), torch.randn(9, 64)
    assert model.quantize_draft_head() == head.weight.nbytes + head.scale.nbytes == 384 * 64 + 3 * 4
    logits, exact = head.logits(hidden), model.logits(hidden)
    assert logits.shape == exact.shape == (9, 321)
    error = float((logits - exact).norm() / exact.norm())
    assert 0.005 < error < 0.05
    values = quantize(hidden).dequantize()
    torch.testing.assert_close(logits, values @ dequantize(head.weight, head.scale)[:321].t())
    assert torch.equal(head.local_logits(hidden), logits)
    whole = head.weight.float(), head.scale.clone()
    monkeypatch.setattr(vocabulary, "ROWS_AT_ONCE", 128)
    head.weight.view(torch.uint8).fill_(255)
    model.quantize_draft_head()
    assert torch.equal(head.weight.float(), whole[0])
    assert torch.equal(head.scale, whole[1])


def test_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, UNIT_TEST, tokenizer=False)
    plain, rounded = (built(directory, mtp=True, draft_fp8=on) for on in (False, True))
    assert plain.draft_output is plain.head
    assert plain.quantize_draft_head() == 0
    names = [[pieces_of(param) for param in model.parameters()] for model in (plain, rounded)]
    assert names[0] == names[1]


@pytest.mark.parametrize("keep", [False, True])
def test_by_default_it_follows_the_weights(tmp_path: Path, keep: bool) -> None:
    directory = write_checkpoint(tmp_path / "a", replace(UNIT_TEST, fp8=True), tokenizer=False)
    model = built(directory, mtp=True, keep_quantized=keep, draft_fp8=None)
    assert isinstance(model.draft_output, Fp8DraftHead) == keep
    model = built(directory, mtp=False, keep_quantized=keep, draft_fp8=None)
    assert model.draft_output is model.head  # nobody drafts
    directory = write_checkpoint(tmp_path / "b", UNIT_TEST, tokenizer=False)
    model = built(directory, mtp=True, keep_quantized=keep, draft_fp8=None)
    assert model.draft_output is model.head  # of no FP8 checkpoint


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_ranks_logits_are_those_of_its_own_tokens(tmp_path: Path, size: int) -> None:
    """Its share of 1,001 is no multiple of a block; all logits but those of padding are < 0."""
    shape = replace(SHAPES[1], vocab_size=1001)
    config = read_config(write_checkpoint(tmp_path, shape, tokenizer=False))
    weight = -torch.rand(1001, 64) - 0.01
    hidden, exact = torch.ones(2, 64), []
    for rank in range(size):
        tp = TensorParallel(rank, size, all_gather=lambda x: x)
        table = VocabTable(
            BuildContext(config, tp, torch.float32, torch.device("cpu"), True), "lm_head.weight"
        )
        share = weight[table.start : table.start + table.rows]
        table.weight.data.zero_()[: len(share)] = share
        head = Fp8DraftHead(table)
        head.quantize()
        assert head.weight.shape[0] % 128 == 0
        assert head.padded_logits(hidden).shape == (2, table.rows)
        local = head.local_logits(hidden)
        assert local.shape == (2, len(share))
        assert bool((local < 0).all())
        exact.append(local)
    whole = torch.cat(exact, 1)
    torch.testing.assert_close(whole, hidden @ weight.t(), rtol=0.02, atol=0)
