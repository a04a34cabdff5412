"""What fits into memory, against what was seen to fit, and refusals that say what would."""

from __future__ import annotations

import pytest

from millrace.errors import ConfigError
from millrace.plan.model.memory import GIB, fit
from millrace.plan.model.step_model import Description


def settings(**changes: object) -> Description:
    base = {"gpu": "h200", "model": "qwen3.5-27b", "drafts": 1, "max_model_len": 2560}
    return Description(**{**base, **changes})


def test_sequences_of_vllm_on_an_h200() -> None:
    """Seen: 234 of 2,560 tokens, 270 to 290 of the headline workload; 512 never fit."""
    found = fit(settings(engine="vllm", window=0), mean_tokens=960, max_num_batched_tokens=16384)
    assert 260 <= found.sequences <= 310
    assert 225 <= found.longest <= 260
    assert found.weights == pytest.approx(29.95e9, rel=0.05)


def test_sequences_of_this_engine() -> None:
    """448 sequences with their states were held."""
    found = fit(settings(), mean_tokens=960, max_num_seqs=512)
    assert found.sequences > 448
    assert found.max_num_seqs == 512 or found.sequences < 512
    assert found.num_pages * found.page_size > 448 * 600
    half = fit(settings(state="bf16"), mean_tokens=960)
    assert half.sequences > 1.4 * found.sequences


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "qwen3.5-397b-a17b"},
         r"weights of .* do not fit into 129.2 GiB; --tensor-parallel-size 4 does"),
        ({"gpu": "l4"}, "do not fit into .*--tensor-parallel-size 2 does"),
        ({"gpu": "l40s", "max_model_len": 262144, "kv": "bf16"},
         r"a context of 262144 needs 1\d.\d GiB and .* --max-model-len \d+ fits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(settings(**changes))


def test_the_context_that_a_refusal_names_fits() -> None:
    with pytest.raises(ConfigError) as error:
        fit(settings(gpu="l40s", max_model_len=262144, kv="bf16"))
    named = int(str(error.value).split("--max-model-len ")[1].split()[0])
    assert fit(settings(gpu="l40s", max_model_len=named, kv="bf16")).longest >= 1


def test_what_failed_under_load_is_a_warning() -> None:
    vllm = settings(engine="vllm", window=0, drafts=5)
    found = " ".join(fit(vllm, utilization=0.95).warnings)
    assert "0.95: 908 failed requests" in found
    assert "5 drafts" in found
    assert fit(settings(), max_num_seqs=64).warnings == ()
    assert "shared with the host" in " ".join(fit(settings(gpu="gb10")).warnings)
    assert fit(settings()).workspace < 8 * GIB
