"""Qwen3 dense: in float32 the logits are those of `transformers`, for any shape and any steps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from millrace.kernels.gemm import dequantize
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.formats.fp8_block import Fp8BlockLinear
from millrace.model.tiny import FP8_BLOCKS, QWEN3, write_checkpoint
from millrace.model.weights import expected_tensors, load
from tests.oracle.conftest import MakePair
from tests.oracle.test_forward import assert_as_near_as_transformers, assert_close, decode
from tests.support.driver import Driver, allocate_caches

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def random_config(seed: int) -> dict[str, Any]:
    """Seeded sizes: group sizes 1 to 8, heads whose width is not the hidden size, tied or not."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3, 4])
    config = {
        **QWEN3,
        "hidden_size": rng.choice([32, 48, 96]),
        "intermediate_size": rng.choice([40, 96, 130]),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": kv_heads * rng.choice([1, 2, 4, 5, 8]),
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([16, 32, 64, 128]),
        "vocab_size": rng.choice([261, 320]),
        "tie_word_embeddings": seed % 2 == 0,
        "rope_theta": rng.choice([1e4, 1e6, 5e6]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
    }
    if seed % 5 == 4:
        config |= {"rope_scaling": {**YARN, "rope_theta": config["rope_theta"]}}
    return config


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(make_pair: MakePair, seed: int) -> None:
    """Prefill in two chunks of any size, then rows of one or several tokens, some rejected."""
    rng = random.Random(seed)
    pair, drafts = make_pair(random_config(seed), seed=seed), seed % 4
    ids = pair.ids(rng.randint(100, 140), seed)
    cut, prompt = sorted(rng.sample(range(1, 90), 2))
    driver, reference = pair.driver(drafts=drafts), pair.reference(ids)
    for start, stop in ((0, cut), (cut, prompt)):
        _, [hidden] = driver.step(prefill=[(2, ids[start:stop])])
        assert_close(pair, hidden, reference[start:stop])
    decode(pair, driver, 2, ids, drafts, rng)


def test_rows_of_many_lengths_share_a_step(make_pair: MakePair) -> None:
    pair = make_pair(QWEN3)
    driver = pair.driver(slots=5)
    sequences = {slot: pair.ids(150, seed=slot) for slot in range(1, 6)}
    references = {slot: pair.reference(ids) for slot, ids in sequences.items()}
    driver.step(prefill=[(slot, sequences[slot][:count]) for slot, count in ((1, 3), (2, 64))])
    for _ in range(3):
        at = driver.lengths.tolist()
        rows = [(slot, sequences[slot][at[slot] : at[slot] + 1]) for slot in (2, 1)]
        prompts = [(s, sequences[s][at[s] : at[s] + n]) for s, n in ((3, 2), (4, 49), (5, 1))]
        verified, prefilled = driver.step(decode=rows, prefill=prompts, padded=2)
        for (slot, ids), hidden in zip([*rows, *prompts], [*verified, *prefilled], strict=True):
            assert_close(pair, hidden, references[slot][at[slot] : at[slot] + len(ids)])
        for slot, _ in rows:
            driver.accept(slot, 1, 1)


def test_only_the_ends_of_prompts_are_asked_for(make_pair: MakePair) -> None:
    pair = make_pair(QWEN3)
    driver, ids = pair.driver(), pair.ids(60)
    reference = pair.reference(ids)
    for stops in ({1: 20, 2: 1}, {1: 40, 3: 33}, {2: 35, 3: 36}):
        starts = driver.lengths.tolist()
        prompts = [(slot, ids[starts[slot] : stop]) for slot, stop in stops.items()]
        _, prefilled = driver.step(prefill=prompts, ends=True)
        for stop, hidden in zip(stops.values(), prefilled, strict=True):
            assert_close(pair, hidden[-1:], reference[stop - 1 : stop])
            assert bool(hidden[:-1].isnan().all())


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_long_context(make_pair: MakePair, scaling: dict[str, Any] | None) -> None:
    """Thousands of positions, in chunks that end within pages, then decode rows."""
    config = {**QWEN3, "num_hidden_layers": 2, "vocab_size": 261}
    if scaling:
        original = {"original_max_position_embeddings": 1024, "rope_theta": 1e6}
        config |= {"rope_scaling": {**scaling, **original}}
    pair = make_pair(config)
    ids = pair.ids(3000)
    reference = pair.reference(ids)
    driver = pair.driver(slots=1, tokens=3000)
    for start in range(0, 2970, 990):
        _, [hidden] = driver.step(prefill=[(1, ids[start : start + 990])])
        assert_close(pair, hidden, reference[start : start + 990])
    decode(pair, driver, 1, ids, 0, random.Random(0))


def test_bfloat16_log_probabilities(make_pair: MakePair) -> None:
    """In bfloat16 we are as near to the float32 reference as `transformers` in bfloat16 is."""
    config = {**QWEN3, "dtype": "bfloat16", "hidden_size": 128, "head_dim": 128}
    pair, exact = make_pair(config, dtype=torch.bfloat16), make_pair(config)
    ids = pair.ids(200)
    driver = pair.driver(tokens=200)
    hidden = [driver.step(prefill=[(1, ids[:150])])[1][0]]
    for start in range(150, 200):
        hidden += driver.step(decode=[(1, ids[start : start + 1])])[0]
        driver.accept(1, 1, 1)
    assert_as_near_as_transformers(pair, exact, ids, torch.cat(hidden))


# --- quantized ---------------------------------------------------------------------------------

FP8 = {
    **QWEN3, "hidden_size": 256, "intermediate_size": 384, "head_dim": 128, "num_hidden_layers": 2,
    "quantization_config": FP8_BLOCKS,
}  # fmt: skip
IDS = [(7 * i + i * i) % 320 for i in range(150)]


def logits(directory: Path, keep: bool) -> tuple[CausalLM, Tensor]:
    model = build_model(read_config(directory), dtype=torch.float32, keep_quantized=keep)
    load(model, directory)
    driver = Driver(model, allocate_caches(model, 1, 40))
    driver.admit(1)
    _, [hidden] = driver.step(prefill=[(1, IDS)])
    return model, model.logits(hidden)


@torch.inference_mode()
def test_fp8_blocks(tmp_path: Path) -> None:
    """Dequantized weights give the logits of `transformers` with the same weights; weights that
    stay e4m3 are the same weights."""
    directory = write_checkpoint(tmp_path / "fp8", FP8)
    model, dequantized = logits(directory, keep=False)
    unquantized = {k: v for k, v in FP8.items() if k != "quantization_config"}
    plain = write_checkpoint(tmp_path / "plain", unquantized)
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    _copy_weights(model, reference)
    expected = reference(torch.tensor([IDS]), use_cache=False).logits[0]
    torch.testing.assert_close(dequantized, expected, rtol=0, atol=1e-4)
    kept, result = logits(directory, keep=True)
    assert len(require_same_weights(kept, model)) == 4 * 2
    assert 1e-4 < (result - dequantized).norm() / dequantized.norm() < 0.1  # rounded activations


def require_same_weights(kept: CausalLM, plain: CausalLM) -> set[str]:
    """The names of the layers that stay e4m3, whose weights must be those of the plain model."""
    names = set()
    for (name, a), b in zip(kept.named_modules(), plain.modules(), strict=True):
        if isinstance(a, Fp8BlockLinear):
            names.add(name)
            assert torch.equal(dequantize(a.weight, a.weight_scale_inv), b.weight)
    return names


def _copy_weights(ours: CausalLM, theirs: Any) -> None:
    """Give the reference our dequantized weights, part by part."""
    for layer, other in zip(ours.layers, theirs.model.layers, strict=True):
        attention, mlp = layer.mixer, layer.mlp
        q, _, k, v = attention.qkv_proj.weight.split(attention.widths)
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        for name, weight in (("q", q), ("k", k), ("v", v), ("o", attention.o_proj.weight)):
            getattr(other.self_attn, f"{name}_proj").weight.data = weight.clone()
        for name, weight in (("gate", gate), ("up", up), ("down", mlp.down_proj.weight)):
            getattr(other.mlp, f"{name}_proj").weight.data = weight.clone()


def test_modules_that_are_not_converted_stay_plain(tmp_path: Path) -> None:
    """Each tensor has the format that config.json says; a fused layer of both is dequantized."""
    skipped = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.k_proj"]
    config = {**FP8, "quantization_config": {**FP8_BLOCKS, "modules_to_not_convert": skipped}}
    directory = write_checkpoint(tmp_path, config)
    kept, _ = logits(directory, keep=True)
    plain, _ = logits(directory, keep=False)
    assert require_same_weights(kept, plain) == {
        "layers.0.mixer.qkv_proj", "layers.0.mixer.o_proj", "layers.1.mixer.o_proj",
        "layers.1.mlp.gate_up_proj", "layers.1.mlp.down_proj",
    }  # fmt: skip
    split = "layers.1.mixer.qkv_proj"  # of both formats
    assert torch.equal(*(model.get_submodule(split).weight for model in (kept, plain)))


# --- configuration -----------------------------------------------------------------------------


def read(directory: Path, **changes: Any) -> Any:
    (directory / "config.json").write_text(json.dumps({**QWEN3, **changes}))
    return read_config(directory)


def test_published_8b(tmp_path: Path) -> None:
    """As published: older entries for rope and dtype, no head_dim in the smallest."""
    config = read(
        tmp_path, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=False, rope_scaling=None, rope_theta=1000000, torch_dtype="bfloat16",
        dtype=None, max_position_embeddings=40960, max_window_layers=36, sliding_window=None,
    )  # fmt: skip
    assert (config.rotary_dim, config.norm_offset, config.mtp_layers) == (128, 0.0, 0)
    assert config.layer_types == ("full_attention",) * 36
    assert (config.dtype, config.max_positions) == ("bfloat16", 40960)
    assert (config.key_heads, config.conv_channels) == (0, 0)


def test_published_8b_tensors(tmp_path: Path) -> None:
    """Names, shapes and kinds of Qwen3-8B-FP8, written out for one layer."""
    expected = expected_tensors(
        read(
            tmp_path, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
            tie_word_embeddings=False, quantization_config={**FP8_BLOCKS, "fmt": "e4m3"},
        )
    )  # fmt: skip
    linears = {
        "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (12288, 4096), "mlp.up_proj": (12288, 4096),
        "mlp.down_proj": (4096, 12288),
    }  # fmt: skip
    norms = {
        "input_layernorm": 4096, "post_attention_layernorm": 4096, "self_attn.q_norm": 128,
        "self_attn.k_norm": 128,
    }  # fmt: skip
    layer = {f"{name}.weight": ((size,), False) for name, size in norms.items()}
    for name, (out, width) in linears.items():
        layer[f"{name}.weight"] = ((out, width), True)
        layer[f"{name}.weight_scale_inv"] = ((out // 128, width // 128), False)
    first = "model.layers.35."
    assert {
        name.removeprefix(first): (spec.shape, spec.dtypes == {"F8_E4M3"})
        for name, spec in expected.items()
        if name.startswith(first)
    } == layer
    rest = {name for name in expected if not name.startswith("model.layers.")}
    assert rest == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert len(expected) == 36 * len(layer) + 3


def test_yarn_lengthens_the_context(tmp_path: Path) -> None:
    """Qwen3's way: only rope_scaling is added, and max_position_embeddings stays."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(tmp_path, rope_scaling=scaling, max_position_embeddings=40960)
    assert config.max_positions == 131072


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}, "qwen2_moe"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    from millrace.errors import CheckpointError

    with pytest.raises(CheckpointError) as error:
        read(tmp_path, **changes)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
