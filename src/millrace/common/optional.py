"""Optional packages: whether each one can be imported, is not installed, or is broken.

The rest of Millrace asks this module before it imports an optional package. A package that is
installed but fails to import is therefore never treated as one that is not installed. The module
knows how to install the packages; it does not know what they are used for.
"""

from __future__ import annotations

import functools
import importlib
import logging
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from millrace.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Package:
    """modules: everything that must be importable, the package's own module first.

    distributions: pip requirements, as in pyproject.toml. extra: the extra of Millrace that
    installs them; empty for a base dependency. hint: another cause of a failed import.
    """

    title: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    extra: str = ""
    hint: str = ""


PACKAGES = {
    "deep_gemm": Package(
        "DeepGEMM",
        ("deep_gemm",),
        ("sgl-deep-gemm==0.1.3", "apache-tvm-ffi==0.1.9"),
        "gpu",
        "CUDA_HOME must name a CUDA toolkit",
    ),
    "kr8s": Package("kr8s", ("kr8s", "kr8s.asyncio"), ("kr8s>=0.20",), "deploy"),
    "llguidance": Package("llguidance", ("llguidance",), ("llguidance>=1.9",)),
    "opentelemetry": Package(
        "OpenTelemetry",
        ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"),
        ("opentelemetry-sdk>=1.27", "opentelemetry-exporter-otlp-proto-http>=1.27"),
        "otel",
    ),
    "optuna": Package("optuna", ("optuna",), ("optuna>=5",), "tune"),
    "pyarrow": Package("pyarrow", ("pyarrow", "pyarrow.parquet"), ("pyarrow>=17",), "bench"),
    "pynvml": Package("nvidia-ml-py", ("pynvml",), ("nvidia-ml-py>=12.535",), "bench"),
}


@dataclass(frozen=True, slots=True)
class PackageStatus:
    """Result of importing a package. error: why a broken package failed, in one line."""

    package: Package
    state: Literal["there", "absent", "broken"]
    module: ModuleType | None = None
    error: str = ""

    @property
    def version(self) -> str:
        """The module's own version; empty if it has none."""
        return str(getattr(self.module, "__version__", ""))

    @property
    def problem(self) -> str:
        """Why the package cannot be used, without a full stop; empty if it can."""
        if self.state == "broken":
            return f"{self.package.title} is installed but cannot be imported ({self.error})"
        return f"{self.package.title} is not installed" if self.state == "absent" else ""

    @property
    def remedy(self) -> str:
        """The command that makes the package usable; empty if it is usable."""
        package = self.package
        if self.state == "broken":
            parts = " ".join(f"'{one}'" for one in package.distributions)
            return f"pip install --force-reinstall {parts}" + (package.hint and f"; {package.hint}")
        if self.state == "there":
            return ""
        return f"pip install 'millrace[{package.extra}]'" if package.extra else _plain(package)


@functools.cache  # a package that failed to import would fail again, after as long a wait
def probe(name: str) -> PackageStatus:
    """The status of a package in PACKAGES, which is imported by the first call. Raises nothing."""
    return _import(PACKAGES[name])


@functools.cache
def available(name: str) -> bool:
    """Whether a package can be used. If not, the first call logs the reason."""
    found = probe(name)
    if found.problem:
        logger.warning("%s; %s", found.problem, found.remedy)
    return not found.problem


def require(name: str, what: str) -> ModuleType:
    """The module of a package that `what` needs. Raises ConfigError, which names the remedy."""
    found = probe(name)
    if found.module is None:
        raise ConfigError(f"{what}: {found.problem}; {found.remedy}")
    return found.module


def _import(package: Package) -> PackageStatus:
    try:
        module, *_ = [importlib.import_module(name) for name in package.modules]
    except ModuleNotFoundError as error:
        own = package.modules[0]
        if error.name and f"{own}.".startswith(f"{error.name}."):
            return PackageStatus(package, "absent")
        return PackageStatus(package, "broken", error=_one_line(error))
    except Exception as error:  # OSError for a library, AssertionError for a missing compiler
        return PackageStatus(package, "broken", error=_one_line(error))
    return PackageStatus(package, "there", module)


def _one_line(error: Exception) -> str:
    """Type and message of an error; the source line that raised it if there is no message."""
    text = " ".join(str(error).split())[:300]
    if not text:
        raised = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{raised.line} in {Path(raised.filename).name}"
    return f"{type(error).__name__}: {text}"


def _plain(package: Package) -> str:
    return "pip install " + " ".join(f"'{one}'" for one in package.distributions)
