"""EAGLE3 drafts are those of its definition, behind hidden vectors that transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.errors import CheckpointError, ConfigError
from millrace.model.tiny import QWEN3, QWEN3_MOE, UNIT_TEST, write_checkpoint
from tests.oracle.eagle3_twin import write_eagle3
from tests.runtime.step.test_cuda_graphs import in_graph_sizes
from tests.runtime.step.test_drafts import PROMPTS, Drafted, heartbeat
from tests.support.engines import assert_same, build, generate, with_few_pages

TOKENS = 14
TIE = 1e-3
LAYERS = 6


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("target") / "model"
    return write_checkpoint(directory, {**QWEN3, "num_hidden_layers": LAYERS}, seed=3)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hybrid") / "model", UNIT_TEST, seed=1)


@pytest.fixture(scope="module")
def plain(target: Path) -> list[list[int]]:
    engine = build(target)
    found = generate(engine, PROMPTS, TOKENS + 6)
    engine.close()
    return found


class Streams:
    """The residual streams of a target, by transformers."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.no_grad()
    def before(self, tokens: tuple[int, ...], layers: tuple[int, ...]) -> Tensor:
        """[T, 3 H]: what enters these layers, one behind the other."""
        found = self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return torch.cat([found[layer][0] for layer in layers], -1)

    @property
    def embedding(self) -> Tensor:
        return self.model.get_input_embeddings().weight.detach()


VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sglang": ({}, (2, 3, 3)),
    "layers.0": ({"layer": "layers.0.", "prefix": "model.", "embedding": True}, (2, 3, 3)),
    "all tokens": ({"draft_vocab_size": 320, "norm_before_residual": True}, (2, 3, 3)),
    "qwen3": ({"architectures": ["Eagle3Qwen3ForCausalLM"], "qk_norm": True}, (2, 3, 3)),
    "norms": ({"input_norm": True, "fc_norm": True, "norm_output": True}, (2, 3, 3)),
    "taps": ({"eagle_aux_hidden_state_layer_ids": [0, 5, 1]}, (0, 5, 1)),
    "behind": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 4]}}, (1, 2, 5)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_drafts_are_those_of_the_definition(
    target: Path, plain: list[list[int]], tmp_path: Path, name: str
) -> None:
    changes, layers = VARIANTS[name]
    directory, twin = write_eagle3(tmp_path / "drafter", **changes)
    spec = {"method": "eagle3", "model": str(directory), "num_speculative_tokens": 3}
    engine = build(target, speculative_config=spec)
    seen = heartbeat(engine, 3, [p + o for p, o in zip(PROMPTS, plain, strict=True)])
    got = generate(engine, PROMPTS, TOKENS)
    stats = engine.stats()
    engine.close()
    assert_same(target, PROMPTS, [tokens[:TOKENS] for tokens in plain], got)
    assert stats.drafts > stats.accepted_per_position[0] > 10
    assert stats.draft_methods["eagle3"].drafts == stats.drafts
    streams = Streams(target)

    def check(one: Drafted) -> None:
        known = streams.before(one.known[:-1], layers)
        found = twin.drafts(list(one.known), known, streams.embedding, 3)
        for place, (draft, logits) in enumerate(zip(one.drafts, found, strict=True)):
            assert logits.max() - logits[draft] < TIE, f"draft {place} of {len(one.known)} tokens"
            if int(logits.argmax()) != draft:
                return  # a tie: what follows differs

    for one in list(dict.fromkeys(seen))[:40]:
        check(one)


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        pytest.param({"async_scheduling": True, "max_num_batched_tokens": 29}, False, id="chunks"),
        pytest.param(
            {"enable_prefix_caching": True, "block_size": 4, "snapshot_interval": 8}, True,
            id="hits-graphs",
        ),
    ],
)  # fmt: skip
def test_no_token_depends_on_the_drafter(
    target: Path, plain: list[list[int]], tmp_path: Path, options: dict[str, Any], graphs: bool
) -> None:
    directory, _ = write_eagle3(tmp_path / "drafter")
    spec = {
        "method": "eagle3", "model": str(directory), "lookup": "suffix", "prompt_lookup_min": 1,
        "num_speculative_tokens": "auto",
    }  # fmt: skip
    engine = build(target, speculative_config=spec, **options)
    if graphs:
        in_graph_sizes(engine)
    heartbeat(engine, 5, [p + o for p, o in zip(PROMPTS, plain, strict=True)])
    want = [tokens[:TOKENS] for tokens in plain]
    for _ in range(1 + engine.scheduler.limits.prefix_caching):
        assert_same(target, PROMPTS, want, generate(engine, PROMPTS, TOKENS))
    assert engine.stats().accepted_per_position[0] > 10
    engine.close()


@pytest.mark.parametrize("shape", [UNIT_TEST, {**QWEN3_MOE, "num_hidden_layers": 5}])
def test_of_hybrid_models_and_of_mixtures(shape: Any, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shape, seed=2)
    drafter, _ = write_eagle3(tmp_path / "drafter")
    outputs, kinds = [], ({}, {"speculative_config": {"model": str(drafter), "method": "eagle3"}})
    for options in kinds:
        engine = build(model, enable_prefix_caching=True, **options)
        outputs.append([generate(engine, PROMPTS, TOKENS) for _ in range(2)])
        outputs[-1].append(generate(engine, PROMPTS, TOKENS, temperature=1.0, seed=3))
        engine.close()
    assert outputs[0] == outputs[1]


def test_what_does_not_fit_the_target_is_named(target: Path, tmp_path: Path) -> None:
    small, _ = write_eagle3(tmp_path / "small", vocab_size=300, draft_vocab_size=200)
    other, _ = write_eagle3(tmp_path / "other", architectures=["LlamaForCausalLM"])
    deep, _ = write_eagle3(tmp_path / "deep", eagle_aux_hidden_state_layer_ids=[2, 3, 9])
    short, _ = write_eagle3(tmp_path / "short", draft_vocab_size=200)
    (short / "config.json").write_text(
        (short / "config.json")
        .read_text()
        .replace('"draft_vocab_size": 200', '"draft_vocab_size": 150')
    )
    for directory, said in (
        (small, "a vocabulary of 300, and this one has 320"),
        (other, "LlamaForCausalLM is no EAGLE3 drafter"),
        (deep, "3 of the target's 6 layers"),
        (short, "lm_head.weight has shape"),
    ):
        with pytest.raises(CheckpointError, match=said):
            build(target, speculative_config={"method": "eagle3", "model": str(directory)})
    with pytest.raises(ConfigError, match='needs "model"'):
        build(target, speculative_config={"method": "eagle3"})
    spec = {"model": str(short)}
    with pytest.raises(ConfigError, match="not yet with tensor_parallel_size above 1"):
        build(target, speculative_config=spec, tensor_parallel_size=2)


# --- a draft model -------------------------------------------------------------------------------


def model_spec(directory: Path, k: int = 3) -> dict[str, Any]:
    return {"speculative_config": {"model": str(directory), "num_speculative_tokens": k}}


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        pytest.param({"async_scheduling": True, "max_num_batched_tokens": 29}, False, id="chunks"),
        pytest.param({"enable_prefix_caching": True, "block_size": 4}, False, id="hits"),
        pytest.param({"max_num_seqs": 2, "async_scheduling": True}, True, id="graphs"),
    ],
)
def test_a_model_that_drafts_for_itself_is_always_right(
    target: Path, plain: list[list[int]], options: dict[str, Any], graphs: bool
) -> None:
    """So its own keys and values are there wherever it drafts, cached prefixes among them."""
    engine = build(target, **model_spec(target), **options)
    if graphs:
        in_graph_sizes(engine)
    want = [tokens[:TOKENS] for tokens in plain]
    for _ in range(1 + engine.scheduler.limits.prefix_caching):
        assert_same(target, PROMPTS, want, generate(engine, PROMPTS, TOKENS))
    stats = engine.stats()
    assert stats.accepted_per_position[-1] > 0.97 * stats.drafts > 10
    assert bool(stats.prefix_hits) == bool(options.get("enable_prefix_caching"))
    assert list(stats.draft_methods) == ["draft_model"]
    engine.close()


def test_another_model_changes_no_token_and_its_pages_are_counted(
    target: Path, plain: list[list[int]], hybrid: Path, tmp_path: Path
) -> None:
    """Of a hybrid target, and of one that is preempted; drawn tokens too."""
    drafter = write_checkpoint(tmp_path / "drafter", {**QWEN3, "num_hidden_layers": 2}, seed=9)
    engine = with_few_pages(build(target, **model_spec(drafter), async_scheduling=True), 18)
    got = generate(engine, PROMPTS, 60)
    assert engine.stats().preemptions > 0
    assert [tokens[:TOKENS] for tokens in got] == [tokens[:TOKENS] for tokens in plain]
    engine.close()
    for params in ({}, {"temperature": 1.0, "seed": 4}):
        outputs, sizes = [], []
        for options in ({}, model_spec(drafter)):
            engine = build(hybrid, **options)
            outputs.append(generate(engine, PROMPTS, TOKENS, **params))
            sizes.append(engine.scheduler.limits.page_bytes)
            engine.close()
        assert outputs[0] == outputs[1]
        assert sizes[1] - sizes[0] == 2 * 2 * 16 * 2 * 32 * 4  # layers, k and v, page, heads, dim


def test_a_draft_model_has_the_same_tokenizer(target: Path, hybrid: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", {**QWEN3, "vocab_size": 400}, seed=1)
    with pytest.raises(CheckpointError, match="it has 400 tokens, and the model has 320"):
        build(target, **model_spec(other))
    with pytest.raises(ConfigError, match="recurrent layers is not yet served"):
        build(target, **model_spec(hybrid))
