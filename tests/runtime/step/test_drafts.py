"""Drafts are what a head says that ran whole, over the whole sequence, in one go.

The runner's head writes keys and values step by step, chunk by chunk, after rejected drafts, and
goes through its layer at a row's last token only. None of that may show.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from millrace.engine.engine import Engine
from millrace.errors import ConfigError
from millrace.eval.models import GenerationOptions, InProcess
from millrace.kernels.batch import Caches
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.parallel import TensorParallel
from millrace.model.tiny import UNIT_TEST, write_checkpoint
from millrace.model.vocabulary import Fp8DraftHead
from millrace.runtime import worker
from millrace.runtime.step.inputs import SampledRows
from millrace.runtime.worker import build_empty_model
from millrace.speculation import Speculation
from millrace.tasks import TASKS
from tests.support.driver import Driver, allocate_caches, make_batch
from tests.support.engines import (
    TIE,
    assert_same,
    build,
    generate,
    run,
    runner_of,
    watch_drafts,
)

MINI = Path(__file__).resolve().parents[3] / "models" / "millrace-mini"

_rng = random.Random(7)
_stem = [_rng.randrange(3, 300) for _ in range(21)]
PROMPTS = [_stem[:-i] + [_rng.randrange(3, 300) for _ in range(n)] for i, n in ((1, 1), (5, 30))]
PROMPTS += [_stem, [9], [_rng.randrange(3, 300) for _ in range(64)], _stem + [4] * 9]
TOKENS = 14


@dataclass(frozen=True)
class Drafted:
    """All known tokens of a sequence, and what is drafted behind them."""

    known: tuple[int, ...]
    drafts: tuple[int, ...]


def heartbeat(engine: Engine, k: int, sequences: list[list[int]]) -> list[Drafted]:
    """Notes every row's drafts; then lets them be the right ones at three positions in four."""
    runner, seen = runner_of(engine), list[Drafted]()
    tokens = runner.slots.tokens

    def lay_right_tokens(slot: int, known: list[int]) -> None:
        for sequence in sequences:
            if sequence[: len(known)] == known:
                for position in range(len(known), min(len(known) + k, len(sequence))):
                    if random.Random(position).random() < 0.75:
                        tokens[slot, position] = sequence[position]

    def after(rows: SampledRows, count: Tensor) -> None:
        ends = (rows.base + count + 1).tolist()
        for slot, end, live in zip(rows.slots.tolist(), ends, (count > 0).tolist(), strict=True):
            tape = tokens[slot, : end + k].tolist()
            if live:
                seen.append(Drafted(tuple(tape[:end]), tuple(tape[end:])))
                lay_right_tokens(slot, tape[:end])

    watch_drafts(runner, after)
    return seen


class WholeHead:
    """Drafts from nothing but the tokens, by a head that goes through its layer at each of them."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    @torch.inference_mode()
    def check(self, one: Drafted) -> None:
        """Each draft is the best token, or as good as the best, behind those before it."""
        driver = Driver(self.model, allocate_caches(self.model, 1, 40))
        driver.admit(1)
        known = list(one.known)
        _, [hidden] = driver.step(prefill=[(1, known[:-1])])
        out = self.head(driver.caches, 1, known[1:], hidden)
        for place, draft in enumerate(one.drafts):
            logits = self.model.logits(out[-1:])[0]
            assert logits.max() - logits[draft] < TIE, f"draft {place} behind {len(known)} tokens"
            out = self.head(driver.caches, len(known) + place, [draft], out[-1:])

    def head(self, caches: Caches, start: int, tokens: list[int], hidden: Tensor) -> Tensor:
        ids, batch = make_batch(caches, torch.tensor([0, start]), [], [(1, tokens)])
        assert self.model.mtp is not None
        out: Tensor = self.model.mtp(ids, hidden, batch, caches)
        return out


@pytest.fixture(scope="module")
def sequences(tiny_model: Path) -> list[list[int]]:
    tokens, _ = run(tiny_model, PROMPTS, TOKENS + 6)
    return [prompt + more for prompt, more in zip(PROMPTS, tokens, strict=True)]


@pytest.mark.parametrize(
    ("k", "options"),
    [
        pytest.param(1, {}, id="1"),
        pytest.param(2, {"async_scheduling": True}, id="2-pipelined"),
        pytest.param(5, {}, id="5"),
        pytest.param(2, {"max_num_batched_tokens": 29}, id="2-chunks"),
        pytest.param(1, {"max_num_batched_tokens": 13, "async_scheduling": True}, id="1-chunks"),
        pytest.param(
            3, {"enable_prefix_caching": True, "block_size": 4, "snapshot_interval": 8}, id="3-hits"
        ),
    ],
)
def test_drafts_are_those_of_a_whole_head(
    tiny_model: Path, sequences: list[list[int]], k: int, options: dict[str, Any]
) -> None:
    engine = build(tiny_model, speculative_config={"num_speculative_tokens": k}, **options)
    seen = heartbeat(engine, k, sequences)
    for _ in range(1 + engine.scheduler.limits.prefix_caching):
        generate(engine, PROMPTS, TOKENS)
    whole = WholeHead(engine.worker.model)  # type: ignore[attr-defined]
    stats = engine.stats()
    assert stats.drafts > stats.accepted_per_position[0] > 10, (
        "some must be accepted and some rejected"
    )
    assert stats.accepted_per_position[-1] > 1
    assert bool(stats.prefix_hits) == bool(options.get("enable_prefix_caching"))
    for one in set(seen):
        whole.check(one)
    engine.close()


@pytest.mark.parametrize(
    ("k", "options"),
    [
        pytest.param(1, {"max_num_batched_tokens": 61, "dtype": "bfloat16"}, id="1-chunks-bf16"),
        pytest.param(2, {"tensor_parallel_size": 2}, id="2-ranks"),
        pytest.param(5, {}, id="5"),
    ],
)
def test_a_trained_head_is_nearly_always_right(k: int, options: dict[str, Any]) -> None:
    """The model that ships was trained until its head knew every token of these answers."""
    _, drafts, accepted = answered(k, **options)
    assert drafts > 20
    assert min(accepted) > 0.97 * drafts


@functools.cache
def answered(
    k: int, temperature: float = 0.0, quantization: str = "none", **options: Any
) -> tuple[list[str], int, list[int]]:
    """What the model that ships says, and its rows of drafts with those that stood by position."""
    items = [TASKS[task].make(index, 0, "heldout") for task in ("math", "chat") for index in (0, 1)]
    options = {"dtype": "float32", "max_model_len": 1024, **options}
    speculative = {"num_speculative_tokens": k, "quantization": quantization}
    model = InProcess(str(MINI), concurrency=3, speculative_config=speculative, **options)
    completions = model.generate(items, GenerationOptions(temperature))
    said = sorted((one.index, one.text) for one in completions)
    assert len(said) == len(items)
    stats = model.stats()
    model.close()
    return [text for _, text in said], stats.drafts, stats.accepted_per_position


# --- an output head in FP8 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "temperature", "options"),
    [
        pytest.param(1, 0.0, {}, id="1"),
        pytest.param(3, 1.0, {}, id="3-drawn"),
        pytest.param(1, 0.0, {"tensor_parallel_size": 2}, id="1-ranks", marks=pytest.mark.sweep),
    ],
)
def test_an_fp8_output_head_accepts_as_many_drafts(
    k: int, temperature: float, options: dict[str, Any]
) -> None:
    """Within 0.2% of those that the exact one makes on one rank, and what is said is the same."""
    exact, drafts, accepted = answered(k, temperature)
    said, rounded_drafts, stood = answered(k, temperature, "fp8", **options)
    assert said == exact
    assert abs(rounded_drafts - drafts) <= 0.002 * drafts
    assert all(abs(a - b) <= 0.002 * drafts for a, b in zip(accepted, stood, strict=True))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an output head of its own; neither 320 tokens nor half of them are whole blocks."""
    directory = tmp_path_factory.mktemp("untied") / "model"
    return write_checkpoint(directory, replace(UNIT_TEST, tied=False), seed=2)


@pytest.mark.parametrize(("tied", "ranks"), [(True, 1), (False, 1), (False, 2)])
def test_an_output_head_in_fp8_changes_no_token(
    tiny_model: Path, untied: Path, tied: bool, ranks: int
) -> None:
    """Greedy ones, drawn ones, and those drawn from a part of the vocabulary."""
    model = tiny_model if tied else untied
    ways: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}]
    ways += [{"temperature": 0.8, "seed": 4, "top_k": 40, "top_p": 0.9}]
    outputs = []
    for speculative in (None, {"num_speculative_tokens": 2, "quantization": "fp8"}):
        size = ranks if speculative else 1
        engine = build(model, speculative_config=speculative, tensor_parallel_size=size)
        outputs.append([generate(engine, PROMPTS, TOKENS, **way) for way in ways])
        head = engine.worker.model.draft_output  # type: ignore[attr-defined]
        assert isinstance(head, Fp8DraftHead) == (speculative is not None)
        engine.close()
    assert_same(model, PROMPTS, outputs[0][0], outputs[1][0])
    assert outputs[0][1:] == outputs[1][1:]


def test_drafts_are_made_with_the_head_in_fp8_and_verified_without() -> None:
    """A spoiled head makes no accepted draft, and costs only time."""
    prompts, outputs, stood = [[5, 90, 17, 300], [44] * 9], [], []
    for spoiled in (False, True):
        speculative = {"num_speculative_tokens": 1, "quantization": "fp8"}
        engine = build(MINI, speculative_config=speculative)
        head = engine.worker.model.draft_output  # type: ignore[attr-defined]
        if spoiled:
            head.scale.neg_()  # the worst token becomes the best
        outputs.append(generate(engine, prompts, 40))
        stood.append(engine.stats().accepted_per_position[0])
        engine.close()
    assert outputs[0] == outputs[1]
    assert stood[0] > 20 > 2 >= stood[1]


def test_a_gpu_that_multiplies_no_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and only where FP8 is asked for."""
    config = build(MINI).worker.config  # type: ignore[attr-defined]
    spec = Speculation(drafts=1, head="mtp", head_drafts=1)
    config = msgspec.structs.replace(config, device="cuda", speculation=spec, draft_fp8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(ConfigError, match='has no FP8 GEMM; use "none"'):
        build_empty_model(config, read_config(MINI), TensorParallel())
    built: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "build_model", lambda *given, **named: built.append(named))
    for changed in ({"draft_fp8": None}, {"draft_fp8": False}, {"speculation": Speculation()}):
        few = msgspec.structs.replace(config, **changed)
        build_empty_model(few, read_config(MINI), TensorParallel())
    assert [(named["keep_quantized"], named["draft_fp8"]) for named in built] == [
        (None, None),
        (None, False),
        (None, True),
    ]
