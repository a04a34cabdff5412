"""The profile run: the largest steps run on one page, whatever the limits are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from millrace.config import EngineConfig, token_buckets
from millrace.kernels.gpu import device
from millrace.kernels.gpu.gemm import prebuild
from millrace.model.build import build_model
from millrace.model.config import read_config
from millrace.model.tiny import TinyShape, write_checkpoint
from millrace.runtime.profile_run import (
    FEW_TOKENS,
    ProfileRun,
    declared_warmup,
    row_counts,
    token_counts,
)
from millrace.runtime.step.cuda_graphs import bucket_sizes
from millrace.runtime.step.inputs import tokens_of
from millrace.runtime.worker import compile_in_background, gpu_memory_budget
from tests.kernels.gpu.gemm.test_choice import MEASURED, TABLES
from tests.kernels.gpu.gpu_support import HAS_TRITON
from tests.support.engines import build, watch_drafts

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

SIZES: list[dict[str, Any]] = [
    {},
    {"max_num_seqs": 64, "max_num_batched_tokens": 700, "mixed_prefill_tokens": 300},
    {"speculative_config": {"num_speculative_tokens": 3}, "enable_prefix_caching": True},
    {"max_num_seqs": 1, "max_model_len": 17, "max_num_batched_tokens": 64},
]


def as_cuda(config: EngineConfig, **changes: Any) -> EngineConfig:
    """The configuration of the same engine on a GPU, whose kernels declare what they need."""
    return msgspec.structs.replace(config, device="cuda", **changes)


def config_of(model: Path, **options: Any) -> EngineConfig:
    config = build(model, **options).config
    assert config is not None
    return config


@pytest.mark.parametrize("options", SIZES)
def test_the_steps_run_on_one_page(tiny_model: Path, options: dict[str, Any]) -> None:
    """As many tokens and drafted rows as are said, and every result is a number."""
    worker: Any = build(tiny_model, **options).worker
    profile = ProfileRun.of(as_cuda(worker.config))
    runner = worker.build_runner(ProfileRun(worker.config, profile.steps).scratch_config, 1, 0)
    tokens: list[int] = []
    forward = worker.model.forward

    def noted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        tokens.append(len(ids))
        hidden: torch.Tensor = forward(ids, *rest)
        assert hidden[-1].isfinite().all()  # without drafts only ends are asked for
        return hidden

    worker.model.forward = noted
    drafted: list[int] = []
    if worker.config.drafts:
        watch_drafts(runner, lambda rows, count: drafted.append(len(rows.slots)))
    profile.run(runner)
    assert tokens == [tokens_of(plan, worker.config.drafts + 1) for plan in profile.steps]
    assert set(tokens) <= set(token_counts(profile.config))
    assert len(drafted) == (len(tokens) if worker.config.drafts else 0)
    assert set(drafted) <= set(row_counts(profile.config))


@pytest.mark.parametrize("options", SIZES)
def test_the_largest_steps_and_those_that_kernels_declare(
    tiny_model: Path, options: dict[str, Any]
) -> None:
    config = config_of(tiny_model, **options)
    width, most = config.drafts + 1, config.max_num_seqs * (config.max_model_len - 1)
    counts = [tokens_of(plan, width) for plan in ProfileRun.of(as_cuda(config)).steps]
    alone, mixed = (tokens_of(plan, width) for plan in ProfileRun.of(config).steps)
    assert alone == min(config.max_num_batched_tokens, most)
    assert mixed == config.max_num_seqs * width + min(config.mixed_prefill_tokens, most)
    declared = declared_warmup(as_cuda(config))
    asked = [shape.decode * width + sum(n for _, n in shape.prompts) for shape in declared.steps]
    few = [count for count in asked if count <= FEW_TOKENS]
    assert few
    rest = [count for count in asked if count > FEW_TOKENS]
    assert counts == [*few, alone, mixed, *rest]
    assert declared.snapshots
    assert not declared_warmup(config).snapshots  # a CPU compiles nothing


@pytest.mark.parametrize("options", SIZES)
def test_the_token_counts_of_graphs_are_known_before(
    tiny_model: Path, options: dict[str, Any]
) -> None:
    config = as_cuda(config_of(tiny_model, **options))
    rows = bucket_sizes(config.max_num_seqs)  # and the draft head has one token of each
    assert set(rows) <= set(row_counts(config))
    counts = token_counts(config)
    assert {*rows, *(n * (config.drafts + 1) for n in rows)} <= set(counts)
    assert len(counts) < 120
    eager = as_cuda(config, args=msgspec.structs.replace(config.args, enforce_eager=True))
    assert len(token_counts(eager)) <= 4
    assert len(row_counts(eager)) <= 4


@pytest.mark.parametrize("name", TABLES)
def test_gemms_are_compiled_at_every_bound_of_their_backends(tiny_model: Path, name: str) -> None:
    config = as_cuda(config_of(tiny_model), max_num_batched_tokens=8192, max_num_seqs=1)
    table = json.loads(MEASURED.joinpath(name).read_text())["fp8_products"]
    bounds = {bound for lines in table.values() for bound, _ in lines}
    assert bounds | set(token_buckets(config.most_mixed_tokens)) <= set(token_counts(config))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_compiled_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Every FP8 weight's shape, if GEMMs are in bfloat16; for drafts' logits by rows."""
    asked: list[set[tuple[int, int, int]]] = []
    ended: list[bool] = []

    @contextmanager
    def compiling(
        sizes: set[tuple[int, int, int]], grouped: set[tuple[int, ...]]
    ) -> Iterator[None]:
        asked.append(sizes)
        assert not grouped
        yield
        ended.append(True)

    monkeypatch.setattr(prebuild, "compiling", compiling)
    directory = write_checkpoint(tmp_path / "fp8", TinyShape(fp8=True))
    model = build_model(
        read_config(directory), dtype=torch.bfloat16, mtp=True, keep_quantized=True, draft_fp8=None
    )
    config = as_cuda(config_of(directory, dtype="float32", max_num_seqs=20), dtype=dtype)
    with ExitStack() as beside:
        compile_in_background(config, model, beside)
        assert not ended
    if dtype == "float32":
        assert not asked
        return
    (sizes,) = asked
    assert ended == [True]
    e4m3 = [p for p in model.parameters() if p.dtype == torch.float8_e4m3fn]
    assert e4m3
    keys_and_values = (2 * 2 * 256, 256)  # of TinyShape
    shapes = {*(tuple(p.shape) for p in e4m3), keys_and_values}
    wanted = {(*shape, tokens) for shape in shapes for tokens in token_counts(config)}
    assert max(row_counts(config)) < 40 < max(token_counts(config))
    assert sizes == wanted | {(2048, 256, rows) for rows in row_counts(config)}


def test_memory_is_measured_once_compilers_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def step(name: str, result: Any) -> Callable[..., Any]:
        def run() -> Any:
            order.append(name)
            return result

        return run

    monkeypatch.setattr(device, "is_unified", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", step("read memory", (100, 200)))
    budget = gpu_memory_budget(0.75, step("profile run", 10), step("stop compilers", None))
    assert budget == 100 - 10 - 50
    assert order == ["profile run", "stop compilers", "read memory"]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_steps_find_attention_of_decode_rows_compiled(heads: int) -> None:
    """Whether keys are read as a whole or in parts, which depends on rows and context."""
    from millrace.kernels.gpu.attention.decode import contexts_of_kernels, key_parts

    for longest in (64, 150, 262144):
        contexts = contexts_of_kernels(longest)
        assert max(contexts) <= longest
        for drafts in (0, 1, 6):  # the last draft's row stands so much further
            known = {key_parts(heads, context + drafts) > 1 for context in contexts}
            lengths = range(50, min(longest, 20000), 50)
            ran = {key_parts(n * heads, c) > 1 for n in (1, 30, 256) for c in lengths}
            assert ran <= known
