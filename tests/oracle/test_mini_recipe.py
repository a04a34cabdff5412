"""What the recipe of models/mini trains is what `transformers` and Millrace serve.

Weights are random here, so nothing of it depends on a training run.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.layers.moe import Experts
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("model", "data", "generate", "optimizer", "train", "export", "make_fp8")
MOE = "millrace-mini-moe"


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    """The scripts of models/mini, which are no package."""
    sys.path.insert(0, str(ROOT / "models" / "mini"))
    known = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.pop(0)
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(known)


@pytest.fixture(scope="module")
def exported(recipe: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the shape that ships, with random weights."""
    directory = tmp_path_factory.mktemp("recipe") / MOE
    directory.mkdir()
    for name in recipe.make_fp8.COPIED[:3]:
        shutil.copyfile(ROOT / "models" / "millrace-mini" / name, directory / name)
    torch.manual_seed(3)
    trained = recipe.model.Mini(recipe.model.SHAPES[MOE])
    for name, value in trained.named_parameters():
        if value.ndim > 1 and "conv1d" not in name:
            value.data.mul_(3)  # so that routers differ and every layer counts
    recipe.export.write_model(directory, trained.shape, trained.state_dict())
    return directory


def trained_logits(recipe: SimpleNamespace, directory: Path, ids: Tensor) -> Tensor:
    """The logits of the training code with the weights of a checkpoint."""
    mini = recipe.model.Mini(recipe.model.SHAPES[MOE])
    weights = recipe.train.load(directory)
    mini.load_state_dict({name: value.float() for name, value in weights.items()})
    packing = recipe.model.Packing.of(torch.ones_like(ids))
    with torch.inference_mode():
        return mini.logits(mini.hidden(ids, packing)[0])  # type: ignore[no-any-return]


def served(directory: Path, **options: Any) -> CausalLM:
    model = build_model(read_config(directory), dtype=torch.float32, mtp=True, **options)
    load(model, directory)
    return model


def served_logits(directory: Path, ids: Tensor) -> Tensor:
    model = served(directory)
    driver = Driver(model, allocate_caches(model, 1, 40))
    driver.admit(1)
    _, [hidden] = driver.step(prefill=[(1, ids[0].tolist())])
    return model.logits(hidden)


def experts_of(model: CausalLM) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


IDS = torch.tensor([[(17 * i + i * i) % 4000 for i in range(64)]])


def test_all_three_compute_the_same(recipe: SimpleNamespace, exported: Path) -> None:
    ours = trained_logits(recipe, exported, IDS)
    other = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert type(other).__name__ == "Qwen3_5MoeForCausalLM"
    with torch.inference_mode():
        theirs = other(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(served_logits(exported, IDS), theirs[0], rtol=0, atol=1e-4)


def test_it_is_small_enough_to_ship(exported: Path) -> None:
    assert sum(path.stat().st_size for path in exported.iterdir()) < 24_000_000


def test_the_fp8_twin_keeps_its_experts(recipe: SimpleNamespace, exported: Path) -> None:
    """One by one, each in its blocks, and as near to the bf16 ones as e4m3 allows."""
    twin = exported.with_name("twin")
    recipe.make_fp8.make_twin(exported, twin)
    exact, kept = (experts_of(served(path, keep_quantized=True)) for path in (exported, twin))
    assert len(kept) == recipe.model.SHAPES[MOE].layers + 1
    for a, b in zip(exact, kept, strict=True):
        for whole, rounded in ((a.gate_up, b.gate_up), (a.down, b.down)):
            assert rounded.values.dtype == torch.float8_e4m3fn
            for expert in (0, 7):
                weight = whole.of(expert, torch.float32)
                error = (rounded.of(expert, torch.float32) - weight).norm() / weight.norm()
                assert float(error) < 0.04


def test_a_few_steps_learn_a_batch_and_say_how_even_the_experts_are(
    recipe: SimpleNamespace,
) -> None:
    torch.manual_seed(0)
    shape = recipe.model.Shape(
        vocab=64, hidden=64, layers=2, interval=2, heads=2, kv_heads=1, head_dim=32, rotary=8,
        key_heads=1, value_heads=2, gdn_dim=32, intermediate=64, experts=4, top_k=2, shared=64,
    )  # fmt: skip
    mini, settings = recipe.model.Mini(shape), recipe.train.Settings()
    ids = torch.randint(64, (2, 64), dtype=torch.int16)
    documents = torch.ones_like(ids)
    documents[:, 40:] = 2
    raw = torch.stack([ids, documents, torch.full_like(ids, recipe.data.ANSWER)])
    optimizers = recipe.optimizer.make_optimizers(mini, 3e-3, 0.0)
    losses = []
    for _ in range(12):
        batch = recipe.train.Batch.of(raw, torch.device("cpu"), 0.0)
        loss, report = recipe.train.main_loss(mini, batch, settings)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(report["loss"]))
    assert losses[-1] < losses[0] - 1
    assert 1 <= float(report["largest_share"]) <= 2
    assert 0 <= float(report["smallest_share"]) <= 1


def test_equal_shares_have_no_imbalance(recipe: SimpleNamespace) -> None:
    even, uneven = torch.full((4, 2), 0.25), torch.tensor([[1.0, 1.0], *[[0.0, 0.0]] * 3])
    assert float(recipe.model.imbalance([even, even])) == 1.0
    assert float(recipe.model.imbalance([uneven])) == 4.0
