"""A run's plan log, replayed on a fresh worker; and ranks started by torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from millrace.engine import plan_log
from tests.support.child_environment import ROOT, child_environment
from tests.support.engines import build, generate

PROMPTS = [[5, 9, 40, 77, 120, 6] * 5, [5, 9, 40, 77, 120, 6] * 5 + [8], [11]]
OPTIONS = {"speculative_config": {"num_speculative_tokens": 2}, "enable_prefix_caching": True}

RANK = """
import sys
from millrace.config import engine_args
from millrace.replica import build as replica
from millrace.runtime.ranks.process_groups import torchrun_rank_info
from tests.support.engines import DEFAULTS, build, generate

model, prompts = sys.argv[1], eval(sys.argv[2])
if torchrun_rank_info(1).rank > 0:
    sys.exit(replica.run_rank(engine_args(model=model, **DEFAULTS)))
engine = build(model)
print("TOKENS", generate(engine, prompts))
engine.close()
"""


def test_a_real_run_replays(tiny_model: Path, tmp_path: Path) -> None:
    """Plans alone bring the same tokens again, with sampling, drafts and cache hits."""
    log = tmp_path / "plan.log"
    engine = build(tiny_model, plan_log=str(log), **OPTIONS)
    for _ in range(2):
        generate(engine, PROMPTS, 20, temperature=1.0)
    assert engine.stats().prefix_hits > 0
    engine.close()
    fresh = build(tiny_model, **OPTIONS)
    assert len(list(plan_log.read(log))) > 20
    assert plan_log.replay(log, fresh.worker) == []
    fresh.close()


def test_torchrun_starts_the_ranks_that_llm_starts_itself(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(tiny_model), repr(PROMPTS)]
    env = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    engine = build(tiny_model)
    expected = generate(engine, PROMPTS)
    engine.close()
    assert f"TOKENS {expected}" in done.stdout
