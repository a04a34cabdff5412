"""Optional packages: which of them load, and what would make the others load."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from millrace.common.optional import PACKAGES, Package, PackageStatus, probe
from millrace.doctor.finding import Finding, Verdict

_FASTER = frozenset({"deep_gemm"})  # a server without them is slower


def packages(hopper: bool) -> Iterator[Finding]:
    """All optional packages. hopper: whether there is a Hopper GPU; others do not use DeepGEMM."""
    for name, package in PACKAGES.items():
        if name == "deep_gemm" and not hopper:
            yield Finding("packages", package.title, "not used: it is for Hopper GPUs")
        else:
            yield _finding(probe(name), name in _FASTER)


def _finding(found: PackageStatus, faster: bool) -> Finding:
    package = found.package
    if found.state == "there":
        return _pinned(package, found.version)
    verdict: Verdict = "warn" if faster else "ok"
    if found.state == "broken" or not package.extra:
        verdict = "fail"
    return Finding("packages", package.title, found.problem, verdict, found.remedy)


def _pinned(package: Package, version: str) -> Finding:
    """A package that loads; a warning where another version than the pinned one is installed."""
    for wanted in package.distributions:
        name, pinned, needed = wanted.partition("==")
        try:
            installed = metadata.version(name) if pinned else needed
        except metadata.PackageNotFoundError:
            continue  # installed without pip
        if installed != needed:
            value, advice = f"loads, but with {name} {installed}", f"pip install '{wanted}'"
            return Finding("packages", package.title, value, "warn", advice)
    return Finding("packages", package.title, version or "loads")
