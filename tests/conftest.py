"""Fixtures that tests of several parts share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.text_model import write_text_model

# An example's time says how busy the machine is, not whether it is right.
settings.register_profile("millrace", deadline=None)
settings.load_profile("millrace")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights."""
    return write_text_model(tmp_path_factory.mktemp("text-model"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, small enough for a test and whole enough for a server."""
    from millrace.model.tiny import UNIT_TEST, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("small") / "model", UNIT_TEST, seed=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
