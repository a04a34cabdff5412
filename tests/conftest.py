"""Fixtures that tests of several parts share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from millrace.common import optional
from tests.support.text_model import write_text_model

# An example's time says how busy the machine is, not whether it is right.
settings.register_profile("millrace", deadline=None)
settings.load_profile("millrace")

# A client of httpx reads all certificates of the machine, which takes 20 ms for each of thousands.
# No test leaves the machine, and those of TLS name their own certificates: this folder has none.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent / "support")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights."""
    return write_text_model(tmp_path_factory.mktemp("text-model"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, small enough for a test and whole enough for a server."""
    from millrace.model.tiny import UNIT_TEST, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("small") / "model", UNIT_TEST, seed=3)


@pytest.fixture
def replace_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str | None], None]]:
    """A function (module, source): from now on importing the module runs the source; None makes it
    a module that is not installed. The real one is back after the test."""

    replaced: list[str] = []

    def replace(module: str, source: str | None) -> None:
        replaced.append(module)
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, name)
        if source is None:
            monkeypatch.setitem(sys.modules, module, None)
        else:
            folder = tmp_path / "packages"
            folder.mkdir(exist_ok=True)
            (folder / f"{module}.py").write_text(source)
            monkeypatch.syspath_prepend(folder)
        forget()

    def forget() -> None:
        optional.probe.cache_clear()
        optional.available.cache_clear()

    yield replace
    for module in replaced:
        sys.modules.pop(module, None)  # the test's own
    forget()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
