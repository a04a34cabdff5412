"""The benchmark that compares log-probabilities with transformers gives it the engine's weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from millrace.model.build import build_model
from millrace.model.config import read_config
from millrace.model.parameter import parameters_with_pieces
from millrace.model.tiny import TinyShape, config_json
from millrace.model.weights import random_weights

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_published_weights_are_a_checkpoint_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms whose weight is stored less 1 are published so, whatever the model holds."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    logprobs = pytest.importorskip("logprobs_h200")
    monkeypatch.setattr(logprobs, "DEVICE", "cpu")
    (tmp_path / "config.json").write_text(json.dumps(config_json(TinyShape(fp8=True))))
    found, quantized = logprobs.published(tmp_path, True)
    assert quantized
    model = build_model(
        read_config(tmp_path), dtype=torch.bfloat16, device="cpu", max_len=8, mtp=True,
        keep_quantized=True,
    )  # fmt: skip
    random_weights(model, logprobs.SEED)
    offsets = set()
    for param, (piece, *_) in parameters_with_pieces(model):
        if "norm" in piece.name and piece.name in found:
            offsets.add(piece.offset)
            assert torch.equal(found[piece.name], param - piece.offset), piece.name
            assert (found[piece.name].mean() - (1.0 - piece.offset)).abs() < 0.2, piece.name
    assert offsets == {0.0, 1.0}
    sys.modules.pop("logprobs_h200", None)
