"""Pairs of one checkpoint: our model and the one of `transformers` that it must equal."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.tiny import UNIT_TEST, TinyShape, write_checkpoint
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclasses.dataclass
class Pair:
    """One checkpoint, loaded twice. reference(ids) gives float32 logits [T, vocab]."""

    directory: Path
    model: CausalLM
    reference_model: Any

    @torch.inference_mode()
    def reference(self, ids: list[int]) -> Tensor:
        return self.reference_model(torch.tensor([ids]), use_cache=False).logits[0].float()

    def driver(self, slots: int = 3, tokens: int = 512, drafts: int = 0, **options: Any) -> Driver:
        """A fresh driver with every slot admitted; pages of 4 tokens."""
        options = {"window": 3 * (drafts + 1), **options}
        pages = -(-(tokens + drafts + 1) // 4)
        driver = Driver(
            self.model, allocate_caches(self.model, slots, pages, drafts=drafts, **options)
        )
        for slot in range(1, slots + 1):
            driver.admit(slot)
        return driver

    def ids(self, count: int, seed: int = 0) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(self.model.config.vocab_size) for _ in range(count)]


MakePair = Callable[..., Pair]


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    """(shape, dtype, seed, reference_dtype or dtype) -> Pair, each made once."""
    from transformers import AutoModelForCausalLM

    made: dict[Any, Pair] = {}

    def make(
        shape: TinyShape | dict[str, Any] = UNIT_TEST,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        reference_dtype: torch.dtype | None = None,
    ) -> Pair:
        key = (repr(shape), dtype, seed, reference_dtype)
        if key not in made:
            directory = write_checkpoint(
                tmp_path_factory.mktemp("pair"), shape, seed=seed, tokenizer=False
            )
            model = build_model(read_config(directory), dtype=dtype, mtp=True)
            load(model, directory)
            experts = {"experts_implementation": "eager"}  # the others know no float64
            reference = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=reference_dtype or dtype,
                **(experts if reference_dtype is torch.float64 else {}),
            ).eval()
            made[key] = Pair(directory, model, reference)
        return made[key]

    return make


def random_shape(seed: int) -> TinyShape:
    """A small model of seeded sizes: head ratios 1 to 3, any pattern of layers, tied or not."""
    rng = random.Random(seed)
    key_heads, kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2])
    layers = rng.randint(1, 5)
    return TinyShape(
        hidden_size=rng.choice([32, 48, 64]),
        intermediate_size=rng.choice([40, 96, 130]),
        num_layers=layers,
        layer_types=tuple(
            rng.choice(["full_attention", "linear_attention"]) for _ in range(layers)
        ),
        num_heads=kv_heads * rng.choice([1, 2, 3]),
        num_kv_heads=kv_heads,
        head_dim=rng.choice([16, 32, 64]),
        key_heads=key_heads,
        value_heads=key_heads * (1 + seed % 3),
        key_dim=rng.choice([8, 16, 24]),
        value_dim=rng.choice([8, 16, 32]),
        vocab_size=rng.choice([261, 320]),
        tied=seed % 2 == 0,
        dtype="float32",
    )
