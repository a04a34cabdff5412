"""A tiny random model, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from millrace.model.tiny import UNIT_TEST, write_checkpoint


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", UNIT_TEST, seed=1)
