"""A family and a weight format that only the tests have are served; nothing else knows them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from millrace.errors import CheckpointError, ConfigError
from millrace.model import registry
from millrace.model.build import build_model
from millrace.model.causal_lm import CausalLM
from millrace.model.config import read_config
from millrace.model.family import Family
from millrace.model.formats.plain import PlainLinear
from millrace.model.parallel import TensorParallel
from millrace.model.registry import FAMILIES, FORMATS, Registry
from millrace.model.tiny import QWEN3, write_checkpoint
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches
from tests.support.engines import assert_same, generate, run, with_few_pages
from tests.support.engines import build as build_engine
from tests.support.extensions import row_int8, toy_family

IDS = [(7 * i + i * i) % 320 for i in range(100)]
ROW_INT8 = {"quant_method": "row_int8", "modules_to_not_convert": ["layers.1"]}


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of the toy family, which is registered meanwhile."""
    FAMILIES.register(toy_family.FAMILY)
    try:
        yield write_checkpoint(tmp_path / "toy", toy_family.CONFIG)
    finally:
        FAMILIES.unregister(toy_family.FAMILY)


@pytest.fixture
def int8(tmp_path: Path) -> Iterator[Path]:
    """A Qwen3 whose first and later layers are in the tests' format; it is registered meanwhile."""
    FORMATS.register(row_int8.FORMAT)
    try:
        config = {**QWEN3, "num_hidden_layers": 3, "quantization_config": ROW_INT8}
        yield write_checkpoint(tmp_path / "int8", config)
    finally:
        FORMATS.unregister(row_int8.FORMAT)


def loaded(directory: Path, **options: Any) -> CausalLM:
    model = build_model(read_config(directory), dtype=torch.float32, **options)
    load(model, directory)
    return model


def logits(model: CausalLM) -> Tensor:
    driver = Driver(model, allocate_caches(model, 1, 40))
    driver.admit(1)
    hidden = [driver.step(prefill=[(1, IDS[:61])])[1][0]]
    for token in IDS[61:]:
        hidden += driver.step(decode=[(1, [token])])[0]
        driver.accept(1, 1, 1)
    return model.logits(torch.cat(hidden))


# --- a family ----------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def rotated(x: Tensor) -> Tensor:
    """[heads, T, 16]: the first 8 dimensions."""
    half = torch.arange(4)
    angle = torch.arange(x.shape[1])[:, None] / 10_000.0 ** (half / 4)
    a, b, rest = x[..., :4], x[..., 4:8], x[..., 8:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def definition(directory: Path) -> Tensor:
    """The toy's logits, from its definition."""
    w = load_file(directory / "model.safetensors")
    x = w["model.embed_tokens.weight"][IDS]
    for i in range(3):
        p = f"model.layers.{i}"
        h = norm(x, w[f"{p}.input_layernorm.weight"])
        q, k, v = (h @ w[f"{p}.self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k, v = (y.unflatten(1, (-1, 16)).transpose(0, 1) for y in (q, k, v))
        k, v = (y.repeat_interleave(2, 0) for y in (rotated(k), v))
        o = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        x = x + o.transpose(0, 1).flatten(1) @ w[f"{p}.self_attn.o_proj.weight"].T
        h = norm(x, w[f"{p}.post_attention_layernorm.weight"])
        up = (h @ w[f"{p}.mlp.up_proj.weight"].T).relu().square()
        x = x + up @ w[f"{p}.mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


@torch.inference_mode()
def test_toy_family_computes_its_definition(toy: Path) -> None:
    torch.testing.assert_close(logits(loaded(toy)), definition(toy), rtol=0, atol=1e-4)


def test_toy_family_in_the_engine(toy: Path) -> None:
    """Batches, chunks, a warm prefix cache and preemption: the same tokens."""
    prompts = [IDS[:n] for n in (1, 16, 40, 77)]
    cold = [run(toy, [prompt], max_num_seqs=1)[0][0] for prompt in prompts]
    options: dict[str, Any] = {"enable_prefix_caching": True, "max_num_batched_tokens": 29}
    engine = with_few_pages(build_engine(toy, **options), 18)
    for _ in range(2):
        assert_same(toy, prompts, cold, generate(engine, prompts))
    assert engine.stats().prefix_hits > 0
    engine.close()


def test_names_of_a_family(toy: Path, tmp_path: Path) -> None:
    """Tensors may have the family's own names."""
    from safetensors.torch import save_file

    expected = logits(loaded(toy))
    tensors = load_file(toy / "model.safetensors")
    renamed = {name.replace("model.", "toy.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, toy / "model.safetensors")
    assert torch.equal(logits(loaded(toy)), expected)


def test_unknown_families_are_refused_with_those_that_are_there(tmp_path: Path) -> None:
    FAMILIES.register(toy_family.FAMILY)
    directory = write_checkpoint(tmp_path, toy_family.CONFIG)
    FAMILIES.unregister(toy_family.FAMILY)
    with pytest.raises(CheckpointError) as error:
        read_config(directory)
    for part in (
        "'toy'",
        "ToyForCausalLM",
        "Qwen3 dense (qwen3)",
        "Qwen3.5 dense",
        "--engine vllm",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_an_installed_package_adds_a_family_and_a_format(tmp_path: Path) -> None:
    """By entry points, so that every process of an engine has them."""
    site = tmp_path / "site"
    package = site / "toy-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[millrace.families]\ntoy = tests.support.extensions.toy_family:FAMILY\n"
        "[millrace.formats]\nrow_int8 = tests.support.extensions.row_int8:FORMAT\n"
    )
    config = {**toy_family.CONFIG, "quantization_config": ROW_INT8}
    code = (
        "import sys; from millrace.model.tiny import write_checkpoint\n"
        "from millrace.model.config import read_config\n"
        f"found = read_config(write_checkpoint(sys.argv[1], {config!r}))\n"
        "print(found.family, found.quantization.method)"
    )
    path = os.pathsep.join([str(site), str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout.split() == ["Toy", "row_int8"]


def test_a_package_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("broken", "nowhere.at_all:FAMILY", "millrace.families")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    fresh: Registry[Family] = Registry("millrace.model.families", "FAMILY", "millrace.families")
    with pytest.raises(ConfigError, match=r"broken of millrace\.families .*No module named"):
        fresh.entries()


# --- a weight format ---------------------------------------------------------------------------


@torch.inference_mode()
def test_a_format_is_kept_or_dequantized(int8: Path) -> None:
    """Layers that are not converted are plain; the others give the same logits in either form."""
    kept, plain = loaded(int8, keep_quantized=None), loaded(int8)
    for name, module in kept.named_modules():
        if isinstance(module, (row_int8.RowInt8Linear, PlainLinear)):
            assert isinstance(module, PlainLinear) == name.startswith("layers.1."), name
    torch.testing.assert_close(logits(kept), logits(plain), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_format_is_cut_for_ranks(int8: Path) -> None:
    """The ranks' parts of a row-parallel layer are added, of a column-parallel one joined."""
    whole = loaded(int8, keep_quantized=None)
    ranks = [loaded(int8, keep_quantized=None, tp=TensorParallel(rank, 2)) for rank in range(2)]
    x = torch.randn(5, 96)
    down = [model.layers[0].mlp.down_proj for model in (whole, *ranks)]
    parts = [layer(part) for layer, part in zip(down[1:], x.chunk(2, 1), strict=True)]
    torch.testing.assert_close(sum(parts), down[0](x), rtol=1e-5, atol=1e-5)
    x = torch.randn(5, 64)
    gate_up = [model.layers[0].mlp.gate_up_proj(x).chunk(2, 1) for model in (whole, *ranks)]
    for one, *parts in zip(*gate_up, strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), one, rtol=1e-5, atol=1e-5)


def test_a_format_in_the_engine(int8: Path) -> None:
    prompts = [IDS[:n] for n in (3, 40)]
    cold = [run(int8, [prompt], max_num_seqs=1)[0][0] for prompt in prompts]
    got, _ = run(int8, prompts, max_num_batched_tokens=29)
    assert_same(int8, prompts, cold, got)


def test_missing_tensors_of_a_format_are_named(int8: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(int8 / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.row_scale"]
    save_file(tensors, int8 / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2\.mlp\.up_proj\.row_scale"):
        loaded(int8)


def test_unknown_formats_are_refused_with_those_that_are_there(tmp_path: Path) -> None:
    config = {**QWEN3, "quantization_config": ROW_INT8}
    with pytest.raises(CheckpointError, match=r"'row_int8' cannot be run; .*fp8, .*engine vllm"):
        write_checkpoint(tmp_path, config)
