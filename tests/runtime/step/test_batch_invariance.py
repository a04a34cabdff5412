"""With `batch_invariant` a request's tokens and log-probabilities are the same bits in any company.

Log-probabilities are compared as they are: they show a difference long before a token does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.config import ModelFacts, engine_args, resolve
from millrace.engine.engine import Engine
from millrace.errors import ConfigError
from millrace.kernels.cpu import call
from millrace.model.tiny import FP8_BLOCKS, QWEN3, QWEN3_MOE, moe_config_json, write_checkpoint
from millrace.protocol import AddRequest, SamplingParams
from tests.support.engines import build, with_few_pages

Answer = list[tuple[int, list[float]]]  # a token, its log-probability and those of the best
MAX_TOKENS = 40
_rng = random.Random(7)
_stem = [_rng.randrange(3, 300) for _ in range(70)]
PROMPTS = [
    *(_stem[: _rng.randint(10, 70)] + [_rng.randrange(3, 300)] * _rng.randint(1, 40) for _ in "12"),
    *([_rng.randrange(3, 300) for _ in range(n)] for n in (1, 15, 16, 33)),
]
FEW_PAGES = 18  # one longest sequence and a little
EXTRAS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "min_p": 0.01, "repetition_penalty": 1.1},
    {"temperature": 0.8, "seed": 6, "top_p": 0.9, "top_k": 50, "presence_penalty": 0.3},
]


def answers(
    engine: Engine, asked: Sequence[tuple[int, int]], resumed: list[Answer]
) -> list[Answer]:
    """What requests get that run together. asked: numbers of prompts, and how many tokens of their
    answers, as `resumed` has them, each begins with."""
    for number, (prompt, known) in enumerate(asked):
        params = SamplingParams(
            max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=3, **EXTRAS[prompt % len(EXTRAS)]
        )
        before = [token for token, _ in resumed[prompt][:known]] if known else []
        engine.add(AddRequest(str(number), PROMPTS[prompt], params, resume=before))
    out: list[Answer] = [resumed[prompt][:known] if known else [] for prompt, known in asked]
    while engine.has_work():
        for delta in engine.step():
            assert delta.logprobs is not None
            found = zip(delta.token_ids, delta.logprobs, strict=True)
            out[int(delta.id)] += [(token, one.logprobs) for token, one in found]
    return out


def alone(model: Path, **options: Any) -> list[Answer]:
    """Each prompt's answer: nothing beside it, nothing cached, no drafts, its prompt whole."""
    engine = build(model, batch_invariant=True, **options)
    try:
        return [answers(engine, [(number, 0)], [])[0] for number in range(len(PROMPTS))]
    finally:
        engine.close()


def scenes() -> st.SearchStrategy[dict[str, Any]]:
    """In which company, and how."""
    asked = st.tuples(st.integers(0, len(PROMPTS) - 1), st.sampled_from([0, 0, 1, 7, 16, 30]))
    return st.fixed_dictionaries(
        {
            "asked": st.lists(asked, min_size=3, max_size=8),
            "drafts": st.integers(0, 5),
            "budget": st.integers(0, 60),
            "page": st.sampled_from([4, 8, 16]),
            "cache": st.booleans(),
            "interval": st.sampled_from([0, 16]),
            "preempt": st.booleans(),
            "pipelined": st.booleans(),
        }
    )


def engine_of(model: Path, scene: dict[str, Any], **options: Any) -> Engine:
    drafts, recurrent = scene["drafts"], "qwen3" not in model.name
    spec = {"speculative_config": {"num_speculative_tokens": drafts}} if drafts else {}
    engine = build(
        model, batch_invariant=True, max_num_batched_tokens=4 * (drafts + 1) + scene["budget"],
        block_size=scene["page"], enable_prefix_caching=scene["cache"],
        snapshot_interval=scene["interval"] * recurrent, async_scheduling=scene["pipelined"],
        **(spec if recurrent else {}), **options,
    )  # fmt: skip
    pages = FEW_PAGES * 16 // scene["page"] + 1
    return with_few_pages(engine, pages) if scene["preempt"] else engine


def check(model: Path, expected: list[Answer], scene: dict[str, Any], **options: Any) -> None:
    engine = engine_of(model, scene, **options)
    try:
        for _ in range(1 + scene["cache"]):  # the second time, what is cached helps
            found = answers(engine, scene["asked"], expected)
            for (prompt, known), answer in zip(scene["asked"], found, strict=True):
                assert answer == expected[prompt], f"prompt {prompt}, resumed behind {known} tokens"
    finally:
        engine.close()


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[Answer]:
    return alone(tiny_model, dtype="bfloat16")


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scenes())
def test_answers_are_the_same_bits(
    tiny_model: Path, expected: list[Answer], scene: dict[str, Any]
) -> None:
    check(tiny_model, expected, scene, dtype="bfloat16")


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp32": {"dtype": "float32"},
    "state-bf16": {"dtype": "bfloat16", "mamba_ssm_cache_dtype": "bfloat16"},
    "state-fp16": {"dtype": "bfloat16", "mamba_ssm_cache_dtype": "float16"},
    "kv-fp8": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "threads": {"dtype": "bfloat16"},
}


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OPTIONS)
def test_sweep_of_data_types(tiny_model: Path, name: str) -> None:
    expected = alone(tiny_model, **OPTIONS[name])

    @settings(max_examples=16)
    @given(scenes())
    def same(scene: dict[str, Any]) -> None:
        check(tiny_model, expected, scene, **OPTIONS[name])

    if name == "threads":
        torch.set_num_threads(2)
    try:
        same()
    finally:
        torch.set_num_threads(1)


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3,
    "qwen3-moe": QWEN3_MOE,
    "moe": moe_config_json(),
    "qwen3-moe-fp8": {
        **QWEN3_MOE, "hidden_size": 128, "head_dim": 128, "num_hidden_layers": 2,
        "moe_intermediate_size": 256, "num_experts": 4, "quantization_config": FP8_BLOCKS,
    },
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MODELS)
def test_sweep_of_models(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(tmp_path / name, MODELS[name], seed=1)
    expected = alone(model, dtype="bfloat16")

    @settings(max_examples=12)
    @given(scenes())
    def same(scene: dict[str, Any]) -> None:
        check(model, expected, scene, dtype="bfloat16")

    same()


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["bf16", "state-bf16", "kv-fp8", "eager"])
def test_on_a_gpu(tiny_model: Path, name: str) -> None:
    options = {"dtype": "bfloat16", **OPTIONS.get(name, {}), "enforce_eager": name == "eager"}
    options |= {"device": "cuda", "debug": False, "gpu_memory_utilization": 0.2}
    expected = alone(tiny_model, **options)

    @settings(max_examples=6)
    @given(scenes())
    def same(scene: dict[str, Any]) -> None:
        check(tiny_model, expected, scene, **options)

    same()


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's ops in place of native code."""
    monkeypatch.setattr(call, "library", lambda: None)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.usefixtures("references")
def test_sweep_of_references(tiny_model: Path, dtype: str) -> None:
    expected = alone(tiny_model, dtype=dtype)

    @settings(max_examples=4)
    @given(scenes())
    def same(scene: dict[str, Any]) -> None:
        check(tiny_model, expected, scene, dtype=dtype)

    same()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tensor_parallel_size": 4}, "more than 2"),
        ({"device": "cuda", "tensor_parallel_size": 2}, "more than 1"),
    ],
)
def test_what_cannot_be_invariant_is_refused(options: dict[str, Any], why: str) -> None:
    facts = ModelFacts(max_position_embeddings=512, checkpoint_dtype="bfloat16", mtp_layers=1)
    args = engine_args(model="m", batch_invariant=True, **{"device": "cpu", **options})
    with pytest.raises(ConfigError, match=why):
        resolve(args, facts, cuda=True)
