"""The write-up's fleet, as a preset: its load, its settings, and what it measured beside them."""

from __future__ import annotations

from millrace.plan.model.step_model import Description
from millrace.plan.predict.load import Load, settings_of
from millrace.plan.predict.prediction import Deployment

NODES = (1, 2, 4, 8, 12)
# nodes -> total tok/s behind a plain service, as measured there
WRITE_UP = {1: 95_317.0, 2: 190_000.0, 4: 376_074.0, 8: 740_192.0, 12: 1_103_941.0}
NODE_HOUR = {"reserved": 88.93, "spot": 32.61}
POLICIES = 50_000.0


def write_up_load() -> Load:
    """Of one node: 2,000 policies at once."""
    return Load(input=768, output=384, concurrency=2000, text="policies")


def write_up_node(engine: str = "vllm", gpu: str = "b200") -> Deployment:
    """Eight replicas of the 27B in FP8, one draft."""
    own = engine == "millrace"
    description = Description(
        gpu=gpu,
        model="qwen3.5-27b",
        engine=engine,
        weights="fp8",
        draft_head="fp8" if own else "bf16",
        kv="fp8",
        window=16 if own else 0,
        drafts=1,
        max_model_len=2560,
    )
    settings = settings_of(
        engine,
        max_num_batched_tokens=16384,
        ranks=1 if own else 8,
        max_num_seqs=256 if own else 1024,
    )
    return Deployment(description, settings, replicas=8)
