"""Optional packages: usable, missing and broken ones are told apart, each with its remedy."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.common.optional import PACKAGES, available, probe, require
from millrace.errors import ConfigError

Replace = Callable[[str, str | None], None]
ROOT = Path(__file__).resolve().parents[2]
NO_CUDA = "home = None\nassert home is not None\n"


def test_one_that_is_not_installed(replace_package: Replace) -> None:
    replace_package("deep_gemm", None)
    found = probe("deep_gemm")
    assert (found.state, found.module, found.version) == ("absent", None, "")
    assert found.problem == "DeepGEMM is not installed"
    assert found.remedy == "pip install 'millrace[gpu]'"


def test_a_base_dependency_that_is_not_installed(replace_package: Replace) -> None:
    replace_package("llguidance", None)
    assert probe("llguidance").remedy == "pip install 'llguidance>=1.9'"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import tvm_ffi_of_nobody", "No module named 'tvm_ffi_of_nobody'"),
        ("raise ImportError('undefined symbol:\\n  TVMFFIErrorMove')", "symbol: TVMFFIErrorMove"),
        ("raise OSError('libcudart.so: cannot open')", "OSError: libcudart.so: cannot open"),
        (NO_CUDA, "AssertionError: assert home is not None in deep_gemm.py"),
    ],
)
def test_one_that_fails_to_import(replace_package: Replace, source: str, error: str) -> None:
    replace_package("deep_gemm", source)
    found = probe("deep_gemm")
    assert (found.state, found.module) == ("broken", None)
    assert found.problem.startswith("DeepGEMM is installed but cannot be imported (")
    assert error in found.problem
    assert "\n" not in found.problem
    assert found.remedy == (
        "pip install --force-reinstall 'sgl-deep-gemm==0.1.3' 'apache-tvm-ffi==0.1.9'; "
        "CUDA_HOME must name a CUDA toolkit"
    )


def test_one_that_lacks_a_part_of_its_own_is_broken(replace_package: Replace) -> None:
    replace_package("pyarrow", "__version__ = '26'")  # without pyarrow.parquet
    assert probe("pyarrow").state == "broken"


def test_one_that_can_be_used(replace_package: Replace) -> None:
    replace_package("deep_gemm", "__version__ = '0.1.3'")
    found = probe("deep_gemm")
    assert (found.state, found.version, found.problem, found.remedy) == ("there", "0.1.3", "", "")
    assert require("deep_gemm", "a test") is found.module


def test_an_import_is_tried_once(replace_package: Replace, tmp_path: Path) -> None:
    note = tmp_path / "imports"
    replace_package("deep_gemm", f"open({str(note)!r}, 'a').write('x')\nraise ImportError('no')")
    for _ in range(3):
        probe("deep_gemm")
    assert note.read_text() == "x"


def test_what_needs_a_package_says_so(replace_package: Replace) -> None:
    replace_package("pynvml", None)
    with pytest.raises(ConfigError, match=r"^--power: nvidia-ml-py is not installed; pip install"):
        require("pynvml", "--power")


def test_the_reason_is_logged_once(
    replace_package: Replace, caplog: pytest.LogCaptureFixture
) -> None:
    replace_package("llguidance", "raise ImportError('no ABI')")
    with caplog.at_level(logging.WARNING):
        assert [available("llguidance") for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert "llguidance is installed but cannot be imported (ImportError: no ABI)" in record.message


def test_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package in PACKAGES.values():
        extras = project["optional-dependencies"]
        wanted = extras[package.extra] if package.extra else project["dependencies"]
        assert set(package.distributions) <= set(wanted)
