"""What options become, and what is said of those that cannot work."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from millrace.config import HELP, EngineArgs, EngineConfig, ModelFacts, engine_args, resolve
from millrace.errors import ConfigError

FACTS = ModelFacts(max_position_embeddings=4096, checkpoint_dtype="bfloat16", mtp_layers=1)


def resolved(cuda: bool = False, facts: ModelFacts = FACTS, **options: Any) -> EngineConfig:
    return resolve(engine_args(model="m", **options), facts, cuda)


def test_a_gpu_and_a_cpu_have_their_own_defaults() -> None:
    on_gpu, on_cpu = resolved(cuda=True), resolved()
    assert (on_gpu.device, on_gpu.max_num_seqs, on_gpu.max_num_batched_tokens) == (
        "cuda",
        256,
        8192,
    )
    assert (on_cpu.device, on_cpu.max_num_seqs, on_cpu.max_num_batched_tokens) == ("cpu", 64, 2048)
    assert (on_gpu.mixed_prefill_tokens, on_cpu.mixed_prefill_tokens) == (1536, 2048)
    assert (on_gpu.async_scheduling, on_cpu.async_scheduling) == (True, False)
    assert resolved(cuda=True, device="cpu").device == "cpu"
    assert resolved(cuda=True, max_num_batched_tokens=1000).mixed_prefill_tokens == 1000
    assert resolved(cuda=False, max_num_batched_tokens=70000).max_num_batched_tokens == 70000
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens 70000: .* at most 65535"):
        resolved(cuda=True, max_num_batched_tokens=70000)
    both = {"mixed_prefill_tokens": 5000, "max_num_batched_tokens": 1000}
    assert resolved(cuda=True, **both).mixed_prefill_tokens == 1000  # no step takes more


def test_long_prompts_are_computed_one_at_a_time_unless_said() -> None:
    def prefills(**options: Any) -> tuple[int, int, int]:
        config = resolved(**options)
        partial, long = config.max_num_partial_prefills, config.max_long_partial_prefills
        return config.long_prefill_token_threshold, partial, long

    assert prefills() == prefills(cuda=True) == (1024, 0, 1)
    assert prefills(long_prefill_token_threshold=0, max_num_partial_prefills=3) == (0, 3, 1)
    assert prefills(max_num_partial_prefills=3, max_long_partial_prefills=2) == (1024, 3, 2)


def test_snapshots_are_no_further_apart_than_the_interval() -> None:
    def distance(**options: Any) -> int:
        return resolved(**options).snapshot_distance

    assert (distance(), distance(cuda=True)) == (64, 128)
    assert distance(cuda=True, snapshot_interval=32) == 32
    assert distance(snapshot_interval=1024) == 64
    assert distance(snapshot_interval=32, snapshot_distance=48) == 48


def test_the_largest_step_with_both_kinds_of_rows() -> None:
    assert resolved(cuda=True).most_mixed_tokens == 1536 + 256
    assert resolved().most_mixed_tokens == 2048  # no step is larger


@pytest.mark.parametrize("checkpoint", ["bfloat16", "float32"])
def test_types_follow_the_checkpoint_unless_said(checkpoint: str) -> None:
    facts = ModelFacts(4096, checkpoint, 1)
    config = resolved(facts=facts)
    assert (config.dtype, config.kv_dtype, config.state_dtype) == (
        checkpoint,
        checkpoint,
        "float32",
    )
    said = resolved(
        facts=facts, dtype="float32", kv_cache_dtype="fp8", mamba_ssm_cache_dtype="bfloat16"
    )
    assert (said.dtype, said.kv_dtype, said.state_dtype) == ("float32", "float8_e4m3fn", "bfloat16")
    assert resolved(mamba_ssm_cache_dtype="float16").state_dtype == "float16"


@pytest.mark.parametrize(("drafts", "window"), [(0, 16), (1, 16), (4, 16), (5, 18)])
def test_the_window_holds_three_steps(drafts: int, window: int) -> None:
    config = resolved(speculative_config={"num_speculative_tokens": drafts})
    assert (config.drafts, config.window) == (drafts, window)


def test_pages_hold_the_longest_sequence_and_its_drafts() -> None:
    config = resolved(max_model_len=160, speculative_config={"num_speculative_tokens": 3})
    assert config.max_pages_per_request == 11


@pytest.mark.parametrize(
    ("said", "rounded"),
    [
        ({}, None),
        ({"quantization": None}, False),
        ({"quantization": "none"}, False),
        ({"quantization": "fp8"}, True),
    ],
)
def test_what_is_not_said_of_the_draft_output_differs_from_none(
    said: dict[str, Any], rounded: bool | None
) -> None:
    """Also after the way to another rank."""
    args = engine_args(model="m", speculative_config={"num_speculative_tokens": 1, **said})
    sent = msgspec.json.decode(msgspec.json.encode(args), type=EngineArgs)
    assert [resolve(one, FACTS, True).draft_fp8 for one in (args, sent)] == [rounded, rounded]
    assert resolved().draft_fp8 is None


def test_one_rate_of_acceptance_counts_for_every_position() -> None:
    def acceptance(rates: Any) -> tuple[float, ...] | None:
        spec = {"num_speculative_tokens": 2, "synthetic_acceptance": rates}
        return resolved(speculative_config=spec).speculation.acceptance

    assert acceptance(0.9) == acceptance([0.9, 0.9]) == (0.9, 0.9)
    assert acceptance(1) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda"}, "no CUDA device is visible"),
        ({"device": "tpu"}, "use one of auto, cpu, cuda"),
        ({"max_model_len": 0}, "max_model_len 0: use 2 or more"),
        ({"max_model_len": 1}, "max_model_len 1: use 2 or more"),
        ({"max_model_len": 4097}, "at most 4096 works"),
        ({"max_num_seqs": 0}, "max_num_seqs 0: use 1 or more"),
        ({"max_num_seqs": -1}, "max_num_seqs -1: use 1 or more"),
        ({"max_num_batched_tokens": 0}, "at least 64 works"),
        ({"max_num_batched_tokens": 63}, "at least 64 works"),
        ({"mixed_prefill_tokens": 0}, "mixed_prefill_tokens 0: use 1 or more"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold -1: use 0 or more"),
        ({"max_num_partial_prefills": 0}, "max_num_partial_prefills 0: use 1 or more"),
        (
            {"max_num_partial_prefills": 2, "max_long_partial_prefills": 3},
            "max_long_partial_prefills 3: use at most max_num_partial_prefills 2",
        ),
        ({"block_size": 24}, "use a power of two from 1 to 128"),
        ({"gpu_memory_utilization": 0.0}, "use (0, 1]"),
        ({"gpu_memory_utilization": 1.1}, "use (0, 1]"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size 0: use 1 or more"),
        ({"snapshot_interval": 24}, "use a multiple of block_size 16"),
        ({"num_snapshots": -1}, "num_snapshots -1: use 0 or more"),
        ({"max_queue": 0}, "max_queue 0: use 1 or more"),
        ({"step_timeout": 0.5}, "use 1 or more, or 0 for no limit"),
        ({"step_timeout": float("nan")}, "use 1 or more, or 0 for no limit"),
        ({"speculative_config": {"num_speculative_tokens": 6}}, "use 0 to 5"),
        (
            {"speculative_config": {"method": "eagle"}},
            "method 'eagle': use mtp, ngram, suffix, eagle3 or draft_model",
        ),
        (
            {"speculative_config": {"method": "ngram", "lookup": "suffix"}},
            'lookup "suffix": it goes with a head; method "ngram" is a look-up itself',
        ),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "prompt_lookup_max": 2,
                    "prompt_lookup_min": 3,
                }
            },
            "speculative_config.prompt_lookup_min 3: use 1 to 2",
        ),
        (
            {"speculative_config": {"method": "suffix", "suffix_decoding_max_spec_factor": 0}},
            "speculative_config.suffix_decoding_max_spec_factor 0: use more than 0",
        ),
        (
            {"speculative_config": {"method": "suffix", "suffix_decoding_min_token_prob": 2}},
            "speculative_config.suffix_decoding_min_token_prob 2: use 0 to 1",
        ),
        ({"speculative_config": {"tokens": 1}}, "engine options"),
        (
            {
                "speculative_config": {
                    "num_speculative_tokens": 2,
                    "num_speculative_tokens_per_batch_size": [[1, 4, 3]],
                }
            },
            "[1, 4, 3]: use [least rows, most rows, drafts], rows from 1 on and 0 to 2 drafts",
        ),
        (
            {
                "speculative_config": {
                    "num_speculative_tokens": 3,
                    "num_speculative_tokens_per_batch_size": [[1, 1, 2], [2, 2, 1], [3, 9, 0]],
                }
            },
            "4 numbers of drafts with num_speculative_tokens",
        ),
        (
            {"speculative_config": {"quantization": "int4"}},
            'speculative_config.quantization "int4": use "fp8" or "none"',
        ),
        ({"speculative_config": {"quantization": ""}}, 'quantization "": use "fp8" or "none"'),
        ({"speculative_config": {"quantization": 8}}, "$.speculative_config.quantization"),
        ({"speculative_config": {"synthetic_acceptance": 1.5}}, "use one rate in [0, 1]"),
        ({"speculative_config": {"synthetic_acceptance": [0.5, 0.5]}}, "or 1 of them"),
        ({"kv_cache_dtype": "int8"}, "use one of auto, float32, bfloat16, fp8, fp8_e4m3"),
        ({"max_seqs": 3}, "unknown option 'max_seqs'"),
        ({"max_num_seqs": "many"}, "engine options"),
    ],
)
def test_what_cannot_work_is_named_with_what_would(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolved(**options)
    assert said in str(refused.value)


def test_drafts_need_a_head_that_makes_them() -> None:
    facts = ModelFacts(4096, "bfloat16", mtp_layers=0)
    with pytest.raises(ConfigError, match="no MTP head"):
        resolved(facts=facts, speculative_config={"num_speculative_tokens": 1})
    assert resolved(facts=facts, speculative_config={"num_speculative_tokens": 0}).drafts == 0


def test_every_option_has_a_help_text() -> None:
    assert set(HELP) == set(EngineArgs.__struct_fields__)
