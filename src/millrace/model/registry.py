"""Which families of models and which weight formats there are.

Built in are the modules of `families/` and `formats/`. Installed packages add theirs by entry
points of the groups `millrace.families` and `millrace.formats`, a program by `register`. So what is
added needs no edit of anything that is there.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from millrace.errors import CheckpointError, ConfigError
from millrace.model.family import Family
from millrace.model.weight_format import Quantization, WeightFormat

T = TypeVar("T")
OTHERS = "--engine vllm serves others"


class Registry(Generic[T]):
    """Entries of one kind. package: whose modules have one each, by the name `attribute`."""

    def __init__(self, package: str, attribute: str, group: str) -> None:
        self._package, self._attribute, self._group = package, attribute, group
        self._registered: list[T] = []

    def register(self, entry: T) -> None:
        """Add an entry; it is found before those that were there."""
        self._registered.insert(0, entry)

    def unregister(self, entry: T) -> None:
        """Take out what `register` added."""
        self._registered.remove(entry)

    def entries(self) -> list[T]:
        """All entries. The built-in modules, which need torch, are imported at the first call."""
        return [*self._registered, *self._found()]

    @functools.cache  # noqa: B019, registries live as long as the process
    def _found(self) -> tuple[T, ...]:
        package = importlib.import_module(self._package)
        names = [entry.name for entry in pkgutil.iter_modules(package.__path__)]
        modules = [importlib.import_module(f"{self._package}.{name}") for name in names]
        installed = [_loaded(entry) for entry in entry_points(group=self._group)]
        built_in = [getattr(module, self._attribute) for module in modules]
        return *installed, *built_in


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise ConfigError(
            f"entry point {entry.name} of {entry.group} ({entry.value}) cannot be loaded: {error}; "
            "repair or remove the package that has it"
        ) from error


FAMILIES: Registry[Family] = Registry("millrace.model.families", "FAMILY", "millrace.families")
FORMATS: Registry[WeightFormat] = Registry("millrace.model.formats", "FORMAT", "millrace.formats")


def family_of(model_type: str | None, architectures: list[str]) -> Family:
    """The family of a config.json with these entries; either may be absent, both must agree.

    Raises CheckpointError with the families that there are.
    """
    for family in FAMILIES.entries():
        if model_type not in (None, *family.model_types):
            continue
        if architectures and not set(architectures) & set(family.architectures):
            continue
        if model_type is not None or architectures:
            return family
    raise CheckpointError(
        f"model_type {model_type!r}{_named(architectures)} cannot be run; supported are "
        f"{_listed()}; {OTHERS}"
    )


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES.entries() if family.name == name)


def _named(architectures: list[str]) -> str:
    return f" with architecture {', '.join(map(str, architectures))}" if architectures else ""


def _listed() -> str:
    families = sorted(FAMILIES.entries(), key=lambda family: family.name)
    return ", ".join(f"{f.name} ({', '.join(f.model_types)})" for f in families)


def quantization_of(entries: Mapping[str, Any] | None) -> Quantization:
    """What a `quantization_config` says. Raises CheckpointError if it cannot be run."""
    formats = FORMATS.entries()
    plain = next(form for form in formats if form.name == "plain")
    if not entries:
        return Quantization("none", plain, plain)
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"quantization_config must be an object, got {str(entries)[:100]!r}")
    method = entries.get("quant_method")
    for form in formats:
        if method in form.methods:
            return form.read_config(entries)
    known = ", ".join(sorted(method for form in formats for method in form.methods))
    raise CheckpointError(
        f"quantization {method!r} cannot be run; {known} and unquantised checkpoints can; {OTHERS}"
    )
