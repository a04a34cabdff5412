"""Published mixtures of experts: their configurations, every tensor, ranks, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.errors import CheckpointError, ConfigError
from millrace.kernels.moe import ExpertWeights, Routes, route, run_experts
from millrace.model.build import build_model
from millrace.model.config import ModelConfig, read_config
from millrace.model.layers.moe import unfused
from millrace.model.parallel import TensorParallel, check_ranks
from millrace.model.parameter import parameters_with_pieces, pieces_of
from millrace.model.tiny import FP8_BLOCKS, QWEN3_MOE, moe_config_json, write_checkpoint
from millrace.model.weights import expected_tensors, load, random_weights
from tests.model.test_parallel import on_ranks, require_same, run

CODER_30B = {
    **QWEN3_MOE, "hidden_size": 2048, "intermediate_size": 5472, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "tie_word_embeddings": False, "rope_theta": 10000000, "max_position_embeddings": 262144,
    "rope_scaling": None, "sliding_window": None, "max_window_layers": 48,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def qwen3_5(
    hidden: int, layers: int, experts: int, top_k: int, width: int, heads: int, values: int
) -> dict[str, Any]:
    """As published: nested, without an intermediate_size."""
    text = {
        "model_type": "qwen3_5_moe_text", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width, "num_attention_heads": heads,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": values, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "vocab_size": 248320,
        "hidden_act": "silu", "attn_output_gate": True, "attention_bias": False,
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144, "dtype": "bfloat16", "eos_token_id": 248044,
        "mlp_only_layers": [], "output_router_logits": False, "router_aux_loss_coef": 0.001,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10], "mrope_interleaved": True,
        },
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False, "text_config": text, "vision_config": {"depth": 27},
    }  # fmt: skip


QWEN3_5 = {
    "35b": qwen3_5(2048, 40, 256, 8, 512, 16, 32),
    "122b": qwen3_5(3072, 48, 256, 8, 1024, 32, 64),
    "397b": qwen3_5(4096, 60, 512, 10, 1024, 32, 64),
}


def read(directory: Path, config: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return read_config(directory)


# --- tensors -----------------------------------------------------------------------------------

Spec = dict[str, tuple[tuple[int, ...], bool]]


def linear(name: str, out: int, width: int, fp8: bool) -> Spec:
    """A weight, and the scales of its blocks."""
    scales = ((-(-out // 128), -(-width // 128)), False)
    return {f"{name}.weight": ((out, width), fp8)} | (
        {f"{name}.weight_scale_inv": scales} if fp8 else {}
    )


def mlp(prefix: str, width: int, hidden: int, fp8: bool) -> Spec:
    return {
        **linear(f"{prefix}.gate_proj", width, hidden, fp8),
        **linear(f"{prefix}.up_proj", width, hidden, fp8),
        **linear(f"{prefix}.down_proj", hidden, width, fp8),
    }


def experts(
    layer: str, count: int, width: int, hidden: int, shared: bool, fp8: bool, fused: bool = False
) -> Spec:
    found: Spec = linear(f"{layer}.mlp.gate", count, hidden, False)
    prefix = f"{layer}.mlp.experts"
    if fused:
        found[f"{prefix}.gate_up_proj"] = ((count, 2 * width, hidden), False)
        found[f"{prefix}.down_proj"] = ((count, hidden, width), False)
    else:
        for expert in range(count):
            found |= mlp(f"{prefix}.{expert}", width, hidden, fp8)
    if shared:
        found |= mlp(f"{layer}.mlp.shared_expert", width, hidden, fp8)
        found |= linear(f"{layer}.mlp.shared_expert_gate", 1, hidden, False)
    return found


def of_mlps(config: ModelConfig) -> Spec:
    """The tensors that are expected of MLPs, and whether they are e4m3."""
    return {
        name: (spec.shape, spec.dtypes == {"F8_E4M3"})
        for name, spec in expected_tensors(config).items()
        if ".mlp." in name
    }


@pytest.mark.parametrize("fp8", [False, True])
def test_tensors_of_35b(tmp_path: Path, fp8: bool) -> None:
    """Names, shapes and kinds, draft head included; 30,720 weights of experts, and their scales."""
    file = QWEN3_5["35b"] | ({"quantization_config": FP8_BLOCKS} if fp8 else {})
    layers = [*(f"model.layers.{i}" for i in range(40)), "mtp.layers.0"]
    wanted: Spec = {}
    for layer in layers:
        wanted |= experts(layer, 256, 512, 2048, shared=True, fp8=fp8)
    found = of_mlps(read(tmp_path, file))
    assert found == wanted
    of_layers = [n for n in found if ".experts." in n and not n.startswith("mtp.")]
    assert len(of_layers) == 30720 * (1 + fp8)


def test_tensors_of_coder_30b(tmp_path: Path) -> None:
    config = read(tmp_path, CODER_30B)
    wanted: Spec = {}
    for i in range(48):
        wanted |= experts(f"model.layers.{i}", 128, 768, 2048, shared=False, fp8=False)
    assert of_mlps(config) == wanted
    assert (config.intermediate_size, config.rope_theta) == (0, 1e7)


NEXT_80B = {
    **{k: v for k, v in QWEN3_5["35b"]["text_config"].items() if not k.startswith("mtp_")},
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
    "num_hidden_layers": 48, "num_experts": 512, "num_experts_per_tok": 10, "vocab_size": 151936,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "intermediate_size": 5120,
}  # fmt: skip


def test_recurrent_layers_of_qwen3_next(tmp_path: Path) -> None:
    """Two projections, of which two ranks take each row once, in FP8 too; a draft head."""
    config = read(tmp_path, {**NEXT_80B, "quantization_config": FP8_BLOCKS})
    prefix = "model.layers.0.linear_attn.in_proj_"
    found = {
        name.removeprefix(prefix): (spec.shape, spec.dtypes == {"F8_E4M3"})
        for name, spec in expected_tensors(config).items()
        if name.startswith(prefix)
    }
    assert found == {
        "qkvz.weight": ((12288, 2048), True), "qkvz.weight_scale_inv": ((96, 16), False),
        "ba.weight": ((64, 2048), False),
    }  # fmt: skip
    assert config.mtp_layers == 1
    taken: dict[str, list[int]] = {}
    for rank in range(2):
        model = build_model(
            config, dtype=torch.bfloat16, device="meta", max_len=1, keep_quantized=True,
            tp=TensorParallel(rank, 2),
        )  # fmt: skip
        mixer = model.layers[0].mixer
        assert mixer.in_proj_qkvz.takes_fp8
        for linear in (mixer.in_proj_qkvz, mixer.in_proj_ab):
            for piece in pieces_of(linear.weight):
                rows = taken.setdefault(piece.name, [])
                rows += [row for start, stop in piece.rows for row in range(start, stop)]
    assert {name: sorted(rows) == list(range(len(rows))) for name, rows in taken.items()} == {
        f"{prefix}qkvz.weight": True, f"{prefix}ba.weight": True,
    }  # fmt: skip
    assert sorted(map(len, taken.values())) == [64, 12288]


def test_fused_tensors_are_those_of_each_expert() -> None:
    """A fused checkpoint has the same weights: what its tensors consist of, each row once."""
    each = experts("model.layers.3", 4, 6, 10, shared=False, fp8=False)
    found: Spec = {}
    for name, (shape, _) in experts(
        "model.layers.3", 4, 6, 10, shared=False, fp8=False, fused=True
    ).items():
        parts = unfused(name, shape)
        if parts is None:
            found[name] = (shape, False)
            continue
        for part in parts:
            found[part.name] = ((part.rows[1] - part.rows[0], shape[2]), False)
        rows = [(part.index, row) for part in parts for row in range(*part.rows)]
        assert sorted(rows) == [(e, row) for e in range(4) for row in range(shape[1])]
    assert found == each
    assert unfused("model.layers.3.mlp.experts.0.gate_proj.weight", (6, 10)) is None
    scales = unfused("model.layers.3.mlp.experts.gate_up_proj_scale_inv", (4, 8, 2))
    assert scales is not None
    assert scales[1].name == "model.layers.3.mlp.experts.0.up_proj.weight_scale_inv"


@pytest.mark.parametrize("name", ["35b", "397b"])
def test_rows_of_published_models_are_taken_once(tmp_path: Path, name: str) -> None:
    """On the meta device, on all ranks together, draft head included."""
    config = read(tmp_path, QWEN3_5[name])
    ranks = 2
    elements = 0
    for rank in range(ranks):
        model = build_model(
            config, dtype=torch.bfloat16, device="meta", max_len=1, mtp=True,
            tp=TensorParallel(rank, ranks),
        )  # fmt: skip
        for param in model.parameters():
            pieces = pieces_of(param)
            assert sum(piece.num_rows for piece in pieces) == param.shape[0]
            if ".experts." in pieces[0].name:
                elements += param.numel()
    experts = config.experts
    assert experts is not None
    layers = config.num_layers + 1
    assert elements == layers * experts.count * 3 * experts.width * config.hidden_size


# --- loading -----------------------------------------------------------------------------------


def test_thousands_of_experts_load_quickly(tmp_path: Path) -> None:
    """Time grows with the number of tensors and not with its square."""
    config = {**QWEN3_MOE, "num_experts": 512, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config |= {"hidden_size": 16, "head_dim": 16, "num_hidden_layers": 2}
    directory = write_checkpoint(tmp_path, config, files=3)
    model = build_model(read_config(directory), dtype=torch.float32)
    start = time.process_time()
    load(model, directory)
    assert time.process_time() - start < 10.0


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, QWEN3_MOE)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_experts": 9}))
    model = build_model(read_config(directory), dtype=torch.float32)
    with pytest.raises(CheckpointError) as error:
        load(model, directory)
    assert "missing model.layers.0.mlp.experts.8.gate_proj.weight" in str(error.value)
    assert "model.layers.0.mlp.gate.weight has shape [8, 64], expected [9, 64]" in str(error.value)


@pytest.mark.parametrize("kept", [False, True])
def test_random_experts_differ(tmp_path: Path, kept: bool) -> None:
    """Weights as in trained models, so that routing spreads and no expert is another's twin."""
    config = {
        **QWEN3_MOE, "hidden_size": 128, "head_dim": 128, "num_hidden_layers": 1,
        "moe_intermediate_size": 128, "quantization_config": FP8_BLOCKS,
    }  # fmt: skip
    model = build_model(read(tmp_path, config), dtype=torch.bfloat16, keep_quantized=kept)
    random_weights(model, 3)
    mlp = model.layers[0].mlp
    for weights in (mlp.experts.gate_up, mlp.experts.down):
        experts = torch.stack([weights.of(i, torch.float32) for i in range(8)])
        spread = experts.std((1, 2)) * 128**0.5
        assert bool(((spread > 0.5) & (spread < 1.6)).all())
        assert len({float(expert[0, 0]) for expert in experts}) == 8
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    counts = route(mlp.router(x), 3, True).experts.flatten().bincount(minlength=8)
    assert int(counts.min()) > 50


# --- ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5", "qwen3_next"])
def test_ranks_agree_with_one(tmp_path: Path, kind: str, size: int, whole: bool) -> None:
    """Each with a part of every expert, or with some whole experts."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    gdn = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    config = {**QWEN3_MOE, **heads} if kind == "qwen3" else {**moe_config_json(), **heads, **gdn}
    if kind == "qwen3_next":
        config |= {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    directory = write_checkpoint(tmp_path, config, fused=size == 2)
    on_all = on_ranks(directory, size, whole_experts=whole)
    require_same(on_all, run(directory, TensorParallel()), 1e-4)


FP8_OF_ONE_BLOCK = {
    **moe_config_json(), "hidden_size": 128, "head_dim": 128, "num_hidden_layers": 4,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "quantization_config": FP8_BLOCKS,
}  # fmt: skip


def test_whole_experts_stay_fp8_where_their_width_cannot_be_cut(tmp_path: Path) -> None:
    """The shared expert, of one block, is on both ranks, each of which runs it for its tokens."""
    directory = write_checkpoint(tmp_path, FP8_OF_ONE_BLOCK)
    on_both = on_ranks(directory, 2, whole_experts=True)
    require_same(on_both, run(directory, TensorParallel()), 1e-4)
    config = read_config(directory)
    for rank in range(2):
        model = build_model(
            config, dtype=torch.float32, keep_quantized=True, device="meta",
            tp=TensorParallel(rank, 2, whole_experts=True),
        )  # fmt: skip
        mlp = model.layers[0].mlp
        assert mlp.experts.first == rank * mlp.experts.count == rank * config.experts.count // 2
        assert mlp.experts.gate_up_values.dtype == torch.float8_e4m3fn
        shared = mlp.shared.gate_up_proj
        assert shared.takes_fp8
        assert shared.outputs == 256
        pieces = {piece.name for _, found in parameters_with_pieces(model) for piece in found}
        absent = f"model.layers.0.mlp.experts.{(1 - rank) * mlp.experts.count}.up_proj.weight"
        assert absent not in pieces


def test_experts_that_are_elsewhere_add_nothing() -> None:
    """Whatever their weights; a token without any expert here gets zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 32, generator=generator)
    gate_up = ExpertWeights(torch.randn(4, 64, 32, generator=generator))
    down = ExpertWeights(torch.randn(4, 32, 32, generator=generator))
    experts = torch.tensor([[0, 3], [-1, 2], [1, -1], [-1, -1], [3, 1]])
    weights = torch.rand(5, 2, generator=generator)
    here = torch.where(experts < 0, 0.0, weights)
    expected = run_experts(x, Routes(experts.clamp(min=0), here), gate_up, down)
    weights[experts < 0] = torch.nan
    for run_one in (run_experts, run_experts.__wrapped__):
        got = run_one(x, Routes(experts, weights), gate_up, down)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert not bool(got[3].any())


def test_fp8_experts_are_cut_between_blocks(tmp_path: Path) -> None:
    """Two ranks with a block each of every expert: dequantized as one rank, and kept."""
    config = {
        **QWEN3_MOE, "hidden_size": 128, "head_dim": 128, "num_hidden_layers": 2,
        "moe_intermediate_size": 256, "num_experts": 4, "quantization_config": FP8_BLOCKS,
    }  # fmt: skip
    directory = write_checkpoint(tmp_path, config)
    require_same(on_ranks(directory, 2), run(directory, TensorParallel()), 1e-4)
    kept = [
        build_model(
            read_config(directory), dtype=torch.float32, tp=TensorParallel(rank, 2),
            keep_quantized=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    whole = build_model(read_config(directory), dtype=torch.float32)
    for model in (*kept, whole):
        load(model, directory)
    for layer in range(2):
        of_ranks = [model.layers[layer].mlp.experts for model in kept]
        alone = whole.layers[layer].mlp.experts
        for expert in range(4):
            gate, up = alone.gate_up.values[expert].chunk(2)
            down = alone.down.values[expert]
            for rank, mine in enumerate(of_ranks):
                assert mine.gate_up.values.dtype == torch.float8_e4m3fn
                share = slice(128 * rank, 128 * (rank + 1))
                expected = torch.cat([gate[share], up[share]])
                assert torch.equal(mine.gate_up.of(expert, torch.float32), expected)
                assert torch.equal(mine.down.of(expert, torch.float32), down[:, share])


@pytest.mark.parametrize(
    ("name", "ranks", "working"), [("35b", 8, "1, 2, 4"), ("122b", 16, "1, 2, 4, 8")]
)
def test_experts_limit_the_ranks(tmp_path: Path, name: str, ranks: int, working: str) -> None:
    config = read(tmp_path, {**QWEN3_5[name], "quantization_config": FP8_BLOCKS})
    with pytest.raises(ConfigError) as error:
        check_ranks(config, ranks)
    width = config.experts.width if config.experts else 0
    assert f"moe_intermediate_size {width} in blocks of 128" in str(error.value)
    assert f"sizes that work: {working};" in str(error.value)


@pytest.mark.parametrize(("name", "working"), [("35b", "1, 2, 4, 8, 16"), ("397b", "1, 2, 4, 8")])
def test_whole_experts_allow_more_ranks(tmp_path: Path, name: str, working: str) -> None:
    """Heads and the number of experts limit them then."""
    config = read(tmp_path, {**QWEN3_5[name], "quantization_config": FP8_BLOCKS})
    check_ranks(config, 8, whole_experts=True)
    with pytest.raises(ConfigError) as error:
        check_ranks(config, 64 if name == "397b" else 32, whole_experts=True)
    assert f"sizes that work: {working}" in str(error.value)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts_per_tok": 9}, "at most num_experts 8, got 9"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_experts": 0}, "num_experts must be a whole number > 0"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers must list layers from 0 to 3"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"mlp_only_layers": [0], "intermediate_size": None}, "intermediate_size is missing"),
    ],
)
def test_qwen3_refusals(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(tmp_path, {**QWEN3_MOE, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": False}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1]},
        {"shared_expert_intermediate_size": None}, {"mtp_num_hidden_layers": 2},
    ],
)  # fmt: skip
def test_qwen3_5_refusals(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        read(tmp_path, {**moe_config_json(), **changes})
