"""GPUs of the benchmark's host: what cannot be read of them is a note, not silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.bench.measure import telemetry
from millrace.bench.report.save import check_raw
from millrace.errors import UserError
from millrace.hardware import nvml

Replace = Callable[[str, str | None], None]
NO_DRIVER = "def nvmlInit():\n    raise RuntimeError('NVML: driver not loaded')\n"
ONE_GPU = """
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return "NVIDIA H200"
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "DRIVER", tmp_path)


@pytest.fixture
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "DRIVER", tmp_path / "none")


def test_gpus_that_can_be_read(driver: None, replace_package: Replace) -> None:
    replace_package("pynvml", ONE_GPU)
    found = telemetry.Gpus()
    assert (found.names, found.notes) == (["NVIDIA H200"], [])


@pytest.mark.parametrize(("source", "words"), [
    (None, "nvidia-ml-py is not installed; pip install 'millrace[bench]'"),
    ("raise ImportError('no _ctypes')", "cannot be imported (ImportError: no _ctypes)"),
    (NO_DRIVER, "RuntimeError: NVML: driver not loaded"),
])  # fmt: skip
def test_gpus_that_cannot(
    driver: None, replace_package: Replace, source: str | None, words: str
) -> None:
    replace_package("pynvml", source)
    found = telemetry.Gpus()
    (note,) = found.notes
    assert note.startswith("power of GPUs is left out: ")
    assert words in note
    assert (found.names, found.sample(), found.energy_j()) == ([], {}, None)


@pytest.mark.parametrize("source", [None, NO_DRIVER])
def test_a_host_without_gpus_says_nothing(
    no_driver: None, replace_package: Replace, source: str | None
) -> None:
    replace_package("pynvml", source)
    assert telemetry.Gpus().notes == []


@pytest.mark.parametrize(("source", "words"), [
    (None, "pyarrow is not installed; pip install 'millrace[bench]'"),
    ("raise ImportError('another ABI')", "cannot be imported (ImportError: another ABI)"),
])  # fmt: skip
def test_raw_data_without_pyarrow(replace_package: Replace, source: str | None, words: str) -> None:
    replace_package("pyarrow", source)
    with pytest.raises(UserError) as caught:
        check_raw("parquet")
    assert words in str(caught.value)
    note = check_raw("auto")
    assert note.startswith("raw data will be JSON Lines: pyarrow is ")
    assert words in note
    assert check_raw("jsonl") == check_raw("none") == ""
