"""What an engine bills for its steps, beside torch's count of the same run, and its arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.work_counted import judged, under_ncu
from millrace.model.work import (
    Accounted,
    DraftModelWork,
    Eagle3Work,
    Formats,
    StepShape,
    WorkAccount,
    step_work,
)
from millrace.plan.facts.models import model_config

ROOT = Path(__file__).parents[3]
KINDS = ("hybrid with experts, 2 drafts", "attention, 4 looked up")
# rows, their tokens, context; prompts, their tokens, context before them, pairs; sampled rows
STEPS = [
    (8, 16, 4000, 0, 0, 0, 0.0, 8),
    (0, 0, 0, 2, 700, 100, 150_000.0, 1),
    (8, 16, 4016, 1, 256, 0, 32_896.0, 9),
]


def test_an_engine_bills_what_torch_counts() -> None:
    """The references of all ops run, in a process of their own. GEMMs within 1%; all products
    within 5%."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.work_counted", "--kinds", *KINDS],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(KINDS)
    for kind in KINDS:
        assert found[kind]["ratio_gemms"] == pytest.approx(1.0, abs=0.01), kind
        assert found[kind]["ratio"] == pytest.approx(1.0, abs=0.05), kind


def test_counters_of_a_gpu_are_summed_over_the_kernels_of_a_step(tmp_path: Path) -> None:
    """By an `ncu` that prints what the real one does: its listing, its table, and in between what
    the step says. Dense and sparse counters of one dtype are not added to it."""
    read, written, tensor = (
        "dram__bytes_read.sum", "dram__bytes_write.sum", "sm__ops_path_tensor_src_fp8_dst_fp32",
    )  # fmt: skip
    parts = {"linear": {"unit": "fp8", "flops": 950.0, "read": 60.0, "written": 20.0}}
    ncu = tmp_path / "ncu"
    ncu.write_text(f"""#!/bin/sh
if [ "$1" = --query-metrics ]; then
    printf '%s  Counter  ops\\n' {tensor} {tensor}_sparsity_off sm__cycles_active
    exit
fi
echo '==PROF== Connected'
echo 'BILLED {json.dumps({"parts": parts})}'
echo '"ID","Kernel Name","{read}","{written}","{tensor}.sum"'
echo '"","","byte","byte",""'
echo '"0","gemm","50","10","1,000"'
echo '"1","norm","30","10","0"'
""")
    ncu.chmod(0o755)
    found = judged(under_ncu(str(ncu), "any", 4, "decode", 30.0))
    assert found["counted"]["sums"] == {read: 80.0, written: 20.0, f"{tensor}.sum": 1000.0}
    assert found["counted"]["kernels"]["gemm"] == [1, 50.0, 10.0, 1000.0]
    assert found["ratios"]["GEMMs to tensor pipes"] == pytest.approx(0.95)
    assert found["ratios"]["bytes to DRAM"] == pytest.approx(0.8)
    ncu.write_text("#!/bin/sh\n[ $1 = --query-metrics ] || exec sleep 60\n")
    assert "no result within 0 s" in judged(under_ncu(str(ncu), "any", 4, "decode", 0.2))["problem"]


@pytest.mark.parametrize("name", ["qwen3.5-27b", "qwen3.5-35b-a3b"])
def test_many_steps_are_the_sum_of_each(name: str) -> None:
    config, formats = model_config(name), Formats(weights="fp8", kv="fp8")
    account = WorkAccount(Accounted(config, formats, head_drafts=1))
    for step in STEPS:
        account.add(step, 1, 0.25)
    found = account.totals()
    assert found.seconds == 0.75
    alone = [step_work(config, StepShape(*step), formats, drafts=1).parts for step in STEPS]
    for part, sums in found.parts.items():
        assert sums.unit == alone[0][part].unit
        assert sums.flops == pytest.approx(sum(one[part].flops for one in alone)), part
        assert sums.read == pytest.approx(sum(one[part].read for one in alone)), part
        assert sums.written == pytest.approx(sum(one[part].written for one in alone)), part
    account.add(STEPS[0], 1, 0.25)
    assert account.totals().parts["linear"].flops > found.parts["linear"].flops


def test_drafts_that_are_looked_up_cost_no_draft_head() -> None:
    config = model_config("qwen3.5-27b")
    shape = StepShape(*STEPS[0])
    looked_up = Accounted(config, Formats(), head_drafts=0).work(shape, 5)
    assert looked_up.parts["draft_layer"].flops == 0
    assert looked_up.parts["linear"].flops > 0
    head = Accounted(config, Formats(), head_drafts=1).work(shape, 5)
    assert (
        head.parts["draft_layer"]
        == step_work(config, shape, Formats(), drafts=1).parts["draft_layer"]
    )


def test_drafters_with_weights_of_their_own() -> None:
    """A whole model runs over all tokens of a step and once for each draft; an EAGLE3 layer too."""
    config, small = model_config("qwen3.5-27b"), model_config("qwen3-8b")
    shape = StepShape(*STEPS[0])
    drafter = DraftModelWork(small, Formats())
    none, two = drafter.part(shape, 0), drafter.part(shape, 2)
    own = step_work(small, shape, Formats()).parts
    assert none.flops == pytest.approx(own["linear"].flops + own["kv"].flops, rel=0.01)
    one = step_work(small, StepShape.of(rows=8, context=500), Formats())
    assert two.flops - none.flops == pytest.approx(2 * one.flops, rel=0.01)
    eagle = Eagle3Work(small, Formats(), config.hidden_size, 32_000)
    assert 0 < eagle.part(shape, 0).flops < eagle.part(shape, 2).flops < two.flops / 5
    whole = Accounted(config, Formats(), head_drafts=2, draft_model=drafter).work(shape, 2)
    assert whole.parts["draft_model"].flops == two.flops
    assert whole.parts["draft_layer"].flops == 0
