"""Which linear layers are in which format: config.json has rules, the files have the truth.

Quantizers leave out routers, small projections and draft heads without saying so, and name layers
as `transformers` does. So rules give the format of a layer that is quantized; whether it is, is
seen by its tensors, if there are files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from millrace.errors import CheckpointError
from millrace.model.weight_format import Quantization, WeightFormat

Choice = WeightFormat | str | None
"""A format; None: plain; or why the layer cannot be run, as the rest of a line after its name."""


@dataclass(frozen=True, slots=True)
class RuledQuantization(Quantization):
    """choose: the format of a layer, of the names that it may have in the rules. stored: flat names
    of all tensors; None: there are no files, so that the rules alone decide."""

    choose: Callable[[list[str]], Choice] = lambda names: None
    stored: frozenset[str] | None = None

    def format_of(self, module: str) -> WeightFormat:
        names = names_of(module)
        if self.stored is None:
            return self._checked(module, self.choose(names))
        if f"{module}.weight" in self.stored and not self._marked(module):
            return self.plain
        return self._checked(module, self.choose(names) or self._unruled(module))

    def format_of_small(self, module: str) -> WeightFormat:
        return self.plain if self.stored is None else self.format_of(module)

    def renamed(self, flat_name: Callable[[str], str | None]) -> Quantization:
        return self

    def with_tensors(self, names: Iterable[str]) -> Quantization:
        return replace(self, stored=frozenset(names))

    def _marked(self, module: str) -> bool:
        assert self.stored is not None
        return any(module + mark in self.stored for mark in MARKS)

    def _unruled(self, module: str) -> Choice:
        """Of a layer that rules leave out: what the others have, if its tensors say so."""
        return self.format if self._marked(module) else None

    def _checked(self, module: str, choice: Choice) -> WeightFormat:
        if isinstance(choice, str):
            raise CheckpointError(f"layer {module}: {choice}")
        return choice or self.plain


MARKS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_2")


def names_of(module: str) -> list[str]:
    """The names that rules may have for the layer of this flat name."""
    found = [module]
    if module.startswith("model."):
        inner = module.removeprefix("model.")
        found += [f"model.language_model.{inner}", f"language_model.{module}", inner]
    return found


def matches(pattern: str, names: list[str]) -> bool:
    """Whether a regular expression matches from the front of one of the names."""
    return any(compiled(pattern).match(name) for name in names)


def is_part(skipped: Iterable[str], names: list[str]) -> bool:
    """Whether one of the listed names is the layer, or parts of its name between dots."""
    listed = [f".{name.removesuffix('.weight')}." for name in skipped]
    return any(one in f".{name}." for one in listed for name in names)


def compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"quantization_config has the pattern {pattern[:100]!r}, which is no regular "
            f"expression ({error})"
        ) from None
