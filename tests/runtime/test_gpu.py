"""The engine on a GPU: the CPU's tokens, with graphs, drafts, cache and pipelining; and no sync.

The CPU twins of these tests are in test_metamorphic.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from millrace.eval.models import GenerationOptions, InProcess
from millrace.model.tiny import TinyShape, write_checkpoint
from millrace.model.vocabulary import Fp8DraftHead
from millrace.protocol import Delta
from millrace.runtime.step.cuda_graphs import StepGraphs
from millrace.tasks import TASKS
from tests.runtime.step.test_logits_processors import PATTERN, add, finish, regex, tokens_of
from tests.support.engines import assert_same, build, generate, with_few_pages

pytestmark = pytest.mark.gpu

MODELS = Path(__file__).resolve().parents[2] / "models"
GPU_TIE = 1e-2  # products of float32 on tensor cores differ from the CPU's in the last bits

_rng = random.Random(1)
_stem = [_rng.randrange(3, 2000) for _ in range(80)]
PROMPTS = [
    _stem[: _rng.randint(0, 80)] + [_rng.randrange(3, 2000) for _ in range(_rng.randint(1, 80))]
    for _ in range(10)
] + [[_rng.randrange(3, 2000) for _ in range(n)] for n in (1, 2, 16, 17, 64, 65, 129)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with the head sizes of the large models."""
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "model", TinyShape(), seed=3)


@pytest.fixture(scope="module")
def on_cpu(model: Path) -> list[list[int]]:
    engine = build(model, max_num_seqs=8, debug=False)
    out = generate(engine, PROMPTS, 32)
    engine.close()
    return out


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Any wait of the host for the device is an error, except where a result is due."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def mtp(k: int, head: str = "none", **options: Any) -> dict[str, Any]:
    """head: the output head for drafts, exact or FP8."""
    speculative = {"num_speculative_tokens": k, "quantization": head}
    return {"speculative_config": speculative, **options}


SUFFIX: dict[str, Any] = {"speculative_config": {"method": "suffix"}}
AUTO: dict[str, Any] = {
    "speculative_config": {
        "num_speculative_tokens": "auto", "lookup": "ngram", "prompt_lookup_min": 1
    }
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"enforce_eager": True, "async_scheduling": False}, id="eager"),
        pytest.param({"enforce_eager": True}, id="eager-pipelined"),
        pytest.param({}, id="graphs"),
        pytest.param({"max_num_batched_tokens": 40}, id="chunks"),
        pytest.param({"enable_prefix_caching": True}, id="prefix-cache"),
        pytest.param(mtp(1, enforce_eager=True), id="mtp-1-eager"),
        pytest.param(mtp(1), id="mtp-1"),
        pytest.param(mtp(3, enable_prefix_caching=True, max_num_batched_tokens=100), id="mtp-3"),
        pytest.param(mtp(5, block_size=64), id="mtp-5"),
        pytest.param(mtp(2, "fp8"), id="mtp-2-fp8"),
        pytest.param(SUFFIX, id="suffix"),
        pytest.param({**AUTO, "enable_prefix_caching": True}, id="auto-and-ngram"),
        pytest.param({**AUTO, "enforce_eager": True}, id="auto-and-ngram-eager"),
        pytest.param({"prefill_graphs": False}, id="eager-prompts"),
        pytest.param(mtp(3, prefill_graphs=False), id="eager-prompts-mtp-3"),
    ],
)
def test_the_cpus_tokens(model: Path, on_cpu: list[list[int]], options: dict[str, Any]) -> None:
    engine = build(model, device="cuda", max_num_seqs=8, **options)
    for _ in range(2):
        got = generate(engine, PROMPTS, 32)
        assert_same(model, PROMPTS, on_cpu, got, GPU_TIE)
    engine.close()


def test_preempted(model: Path, on_cpu: list[list[int]]) -> None:
    engine = build(model, device="cuda", max_num_seqs=8, **mtp(2))
    engine = with_few_pages(engine, 30)
    got = generate(engine, PROMPTS, 32)
    assert engine.stats().preemptions > 0
    assert_same(model, PROMPTS, on_cpu, got, GPU_TIE)
    engine.close()


def test_the_share_of_memory_holds_while_every_row_runs(model: Path) -> None:
    """Workspaces and graphs are counted: a full engine stays below what it was given."""
    share = 0.08
    engine = build(
        model, device="cuda", dtype="bfloat16", max_num_seqs=256, max_model_len=2048,
        max_num_batched_tokens=16384, gpu_memory_utilization=share, debug=False, **mtp(1),
    )  # fmt: skip
    prompts = [[3 + (7 * i + j) % 2000 for j in range(700 + i)] for i in range(300)]
    generate(engine, prompts, 40, temperature=1.0, top_p=0.9)
    free, total = torch.cuda.mem_get_info()
    engine.close()
    assert total - free <= share * total


@pytest.mark.parametrize(
    "options", [{}, {"enforce_eager": True}, {"enable_prefix_caching": True}, SUFFIX, AUTO]
)
def test_no_step_waits_for_the_device(
    model: Path, on_cpu: list[list[int]], options: dict[str, Any], no_sync: None
) -> None:
    torch.cuda.set_sync_debug_mode("default")
    engine = build(model, device="cuda", max_num_seqs=8, debug=False, **{**mtp(2), **options})
    generate(engine, PROMPTS, 4)  # compiles what it needs
    torch.cuda.set_sync_debug_mode("error")
    got = generate(engine, PROMPTS, 32)
    torch.cuda.set_sync_debug_mode("default")
    assert_same(model, PROMPTS, on_cpu, got, GPU_TIE)
    engine.close()


def test_a_closed_engine_leaves_no_memory(model: Path) -> None:
    """Although the garbage collector does not look at what was there when it was frozen."""
    taken = []
    for _ in range(3):
        build(model, device="cuda", dtype="bfloat16", max_num_seqs=8, **mtp(1)).close()
        taken.append(torch.cuda.memory_allocated())
    assert max(taken) - taken[0] < 1 << 20


def test_a_step_that_samples_nothing_is_waited_for(model: Path) -> None:
    """Otherwise every step of a long prompt is launched before another prompt can be planned."""
    engine = build(
        model, device="cuda", max_num_seqs=2, max_num_batched_tokens=64, async_scheduling=False
    )
    add(engine, "long", list(range(3, 203)), max_tokens=1)
    torch.cuda._sleep(1 << 28)  # about 0.15 s, ahead of the step
    assert engine.step() == []
    assert torch.cuda.current_stream().query()
    finish(engine)
    engine.close()


@pytest.mark.parametrize(
    "options", [{}, mtp(2), {"prefill_graphs": False}, mtp(2, prefill_graphs=False), AUTO]
)
def test_nothing_is_compiled_or_captured_once_ready(
    model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Nor does a step wait for the device, whatever its rows ask for."""
    from triton.runtime.jit import JITFunction

    from millrace.kernels.gpu import cuda_source

    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 2048, **options}
    engine = build(model, device="cuda", max_num_seqs=8, debug=False, **options)

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError(f"a step compiles or captures {given[:1]}")

    monkeypatch.setattr(JITFunction, "_do_compile", refuse)
    monkeypatch.setattr(cuda_source, "compiled", refuse)
    monkeypatch.setattr(StepGraphs, "capture", refuse)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sampling in ({}, {"temperature": 1.0, "top_k": 20, "top_p": 0.95}):
            generate(engine, PROMPTS, 12, **sampling)
        for index, prompt in enumerate(PROMPTS):
            add(engine, str(index), prompt, **WISHES[index % len(WISHES)])
        add(engine, "grammar", PROMPTS[0], grammar=regex(PATTERN), max_tokens=30)
        finish(engine)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.stats().prefix_hits > 0
    engine.close()


@pytest.mark.parametrize(("kv", "share"), [("auto", 0.85), ("fp8_e4m3", 0.6)])
def test_graphs_bring_the_tokens_of_eager_steps(model: Path, kv: str, share: float) -> None:
    """In bfloat16, in which a rounding shows. An FP8 KV cache turns some of these into steps of
    6%, so fewer texts of random weights stay the same: 12 of 17 were, on an H200."""
    outputs = []
    for options in ({"enforce_eager": True}, {}, {"prefill_graphs": False}):
        engine = build(
            model, device="cuda", dtype="bfloat16", kv_cache_dtype=kv, max_num_seqs=8, **options
        )
        outputs.append(generate(engine, PROMPTS, 32))
        engine.close()
    same = [sum(a == b for a, b in zip(outputs[0], other, strict=True)) for other in outputs[1:]]
    assert min(same) >= share * len(PROMPTS), "GEMMs of more tokens may be tiled otherwise"


def test_sampled_tokens_do_not_depend_on_drafts_or_graphs(model: Path) -> None:
    outputs = []
    for options in ({}, mtp(1), mtp(3, enforce_eager=True)):
        engine = build(model, device="cuda", max_num_seqs=8, **options)
        outputs.append(
            generate(engine, PROMPTS[:4], 24, temperature=0.8, seed=5, top_p=0.9, top_k=50)
        )
        engine.close()
    same = [sum(a == b for a, b in zip(outputs[0], other, strict=True)) for other in outputs[1:]]
    assert min(same) >= 3, "fp32 rounding may flip a draw now and then, not as a rule"


@pytest.mark.parametrize("name", ["millrace-mini", "millrace-mini-fp8"])
@pytest.mark.parametrize("rows", [4, 24])
def test_an_fp8_output_head_accepts_as_many_drafts(name: str, rows: int) -> None:
    """In bfloat16, with few rows and with many, which go to other kernels."""
    items = [TASKS[task].make(i, 0, "heldout") for task in ("math", "chat") for i in range(12)]
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 1024}
    options["gpu_memory_utilization"] = 0.1
    said, rates = [], []
    for head in ("none", "fp8"):
        model = InProcess(str(MODELS / name), concurrency=rows, **mtp(1, head, **options))
        found = sorted((one.index, one.text) for one in model.generate(items, GenerationOptions()))
        said.append([text for _, text in found])
        stats = model.stats()
        model.close()
        rates.append(stats.accepted_per_position[0] / stats.drafts)
    assert rates[1] > rates[0] - 0.005 > 0.9
    same = sum(a == b for a, b in zip(*said, strict=True))
    assert same >= len(items) - 2, "a rounding of bfloat16 may flip a token, not as a rule"


@pytest.mark.parametrize(
    ("name", "head", "rounded"),
    [
        ("millrace-mini-fp8", None, True),
        ("millrace-mini-fp8", "none", False),
        ("millrace-mini", None, False),
        ("millrace-mini", "fp8", True),
    ],
)
def test_where_the_output_head_is_rounded(name: str, head: str | None, rounded: bool) -> None:
    speculative = {"num_speculative_tokens": 1, **({"quantization": head} if head else {})}
    engine = build(
        MODELS / name, device="cuda", dtype="bfloat16", enforce_eager=True,
        gpu_memory_utilization=0.1, speculative_config=speculative,
    )  # fmt: skip
    found = engine.worker.model.draft_output  # type: ignore[attr-defined]
    assert isinstance(found, Fp8DraftHead) == rounded
    engine.close()


WISHES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": {7: 3.0, 900: 2.0}, "min_p": 0.05, "temperature": 0.7, "seed": 3},
    {"allowed_token_ids": list(range(40, 400)), "logprobs": 3, "prompt_logprobs": 1},
    {"bad_words": [[5], [6, 7]], "min_tokens": 4},
    {},
]


def _with_options(model: Path, **options: Any) -> dict[str, list[Delta]]:
    """Every prompt with one of the sampling options, and some under a grammar."""
    engine = build(model, max_num_seqs=8, **options)
    for index, prompt in enumerate(PROMPTS):
        add(engine, str(index), prompt, **WISHES[index % len(WISHES)])
    for seed in range(3):
        processors = {"grammar": regex(PATTERN), "temperature": 1.0, "seed": seed, "max_tokens": 60}
        add(engine, f"grammar-{seed}", PROMPTS[seed], **processors)
    found = finish(engine)
    engine.close()
    return found


@pytest.mark.parametrize("options", [{}, mtp(1), mtp(3, enforce_eager=True)])
def test_sampling_options_bring_the_cpus_tokens(model: Path, options: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    want = _with_options(model)
    got = _with_options(model, device="cuda", **options)
    same = sum(tokens_of(want[name]) == tokens_of(got[name]) for name in want)
    assert same >= len(want) - 2, "fp32 rounding may flip a token now and then, not as a rule"
    for seed in range(3):
        text = tokenizer.decode(tokens_of(got[f"grammar-{seed}"]))
        assert re.fullmatch(PATTERN, text), text
    for name, deltas in want.items():
        if tokens_of(deltas) == tokens_of(got[name]):
            lines = [
                [line for d in run for line in d.logprobs or []] for run in (deltas, got[name])
            ]
            for one, other in zip(*lines, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-2)
