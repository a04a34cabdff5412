"""When prompts and answers apart pay: what must hold for every model of time."""

from __future__ import annotations

import math

import msgspec
import pytest

from millrace.cli import run
from millrace.errors import ConfigError
from millrace.plan.hand_over import Cases, Row, table
from millrace.plan.model.posterior import posterior
from millrace.plan.model.step_model import Description

D = Description(gpu="h200", model="qwen3.5-27b", max_model_len=40960)
CASES = Cases([1024, 8192, 32768], [64, 512], ["fp32", "bf16"], [1.2, 48.0], 8, 64)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return table(D, CASES, posterior())


def test_a_faster_link_and_smaller_states_never_take_longer(rows: list[Row]) -> None:
    found = {(r.prompt, r.output, r.state, r.link): r for r in rows}
    for (prompt, output, state, link), row in found.items():
        assert row.move_s >= found[prompt, output, state, 48.0].move_s
        assert row.bytes >= found[prompt, output, "bf16", link].bytes
        assert 1 <= row.prefill < 8
        assert row.gap_together > row.gap_apart


def test_a_verdict_is_what_the_figures_say(rows: list[Row]) -> None:
    for row in rows:
        if row.verdict == "apart":
            assert row.link >= row.least_link
            assert row.apart >= 0.8 * row.together
    assert {row.verdict for row in rows} == {"apart", "together"}
    # A record of 1K tokens is mostly its states; a long prompt's is worth its move.
    assert all(
        row.verdict == "together" for row in rows if (row.prompt, row.state) == (1024, "fp32")
    )
    assert any(row.verdict == "apart" for row in rows if row.prompt == 8192)


def test_the_least_link_is_the_break_even(rows: list[Row]) -> None:
    """There a move takes a quarter of the prompt's time."""
    row = next(row for row in rows if math.isfinite(row.least_link))
    again = table(
        D, Cases([row.prompt], [row.output], [row.state], [row.least_link], 8, 64), posterior()
    )
    assert again[0].move_s == pytest.approx(row.prompt_s / 4, rel=1e-6)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--gpus 1: two replicas or more"):
        table(D, msgspec.structs.replace(CASES, gpus=1), posterior())
    assert run(["plan", "hand-over", "qwen3.5-27b", "--gpu", "h200", "--prompts", "1k"]) == 2
    assert "--prompts 1k: use numbers" in capsys.readouterr().err
