"""Which implementation of an op runs: the torch reference, or the fast path of the device.

It knows where fast paths are, not what they do. They are imported at the first call on their
device, so a machine without a GPU does not need the packages that GPU kernels import. It also knows
whether ops are to be batch invariant: fast paths ask, and references are marked.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class BackendChoice(NamedTuple):
    """Which backend runs an op on this machine, and why no faster one does.

    backend: the library or kernel. reason: why a faster backend is not used; empty if there is
    none. remedy: a command that makes the faster one available; empty if there is none.
    """

    op: str
    backend: str
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.op}: {self.backend}" + (f"; {self.reason}" if self.reason else "")
        return f"{text} ({self.remedy})" if self.remedy else text


_REMEMBERED: list[Any] = []


def remembered(find_out: Callable[P, R]) -> Callable[P, R]:
    """Cache what is found out about this machine: its devices, compilers and packages."""
    cached = functools.cache(find_out)
    _REMEMBERED.append(cached)
    return cast(Callable[P, R], cached)


def forget() -> None:
    """Drop everything that is `remembered`, because the machine is another one now (in tests)."""
    for cached in _REMEMBERED:
        cached.cache_clear()


def op(reference: Callable[P, R]) -> Callable[P, R]:
    """Make `reference` an op that is dispatched by the device of its first argument, a tensor.

    A fast path is the function of the same name in `millrace.kernels.gpu.<same module>` for CUDA
    tensors, in `millrace.kernels.cpu.<same module>` for others. The reference runs if there is no
    fast path, or if it returns NotImplemented because it does not support the arguments. The
    reference itself is available as `__wrapped__`.
    """

    @functools.cache
    def fast_path(package: str) -> Callable[P, Any] | None:
        return find_fast_path(package, reference.__module__, reference.__name__)

    @functools.wraps(reference)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        found = fast_path("gpu" if first.is_cuda else "cpu")
        if found is None:
            return reference(*args, **kwargs)
        result: R = found(*args, **kwargs)
        return reference(*args, **kwargs) if result is NotImplemented else result

    return dispatch


def find_fast_path(device: str, module: str, name: str) -> Callable[..., Any] | None:
    """The fast path of op `name` of `module` on "cpu" or "gpu"; None: the reference runs."""
    found: Callable[..., Any] | None = getattr(_fast_module(device, module), name, None)
    return found


def _fast_module(device: str, module: str) -> ModuleType | None:
    package, _, leaf = module.rpartition(".")
    fast_module = f"{package}.{device}.{leaf}"
    try:
        return importlib.import_module(fast_module)
    except ModuleNotFoundError as error:
        if error.name not in (fast_module, f"{package}.{device}"):
            raise  # the fast path exists, but a package that it needs does not
        return None


def fast_modules(device: str) -> list[ModuleType]:
    """The modules of fast paths for "cpu" or "gpu". Imports the references, too."""
    modules = dict.fromkeys(module for module, _ in all_ops())
    return [found for module in modules if (found := _fast_module(device, module))]


def all_ops() -> list[tuple[str, str]]:
    """(full module name, op name) of every op. Imports the references."""
    package, _, own = __name__.rpartition(".")
    found = []
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if entry.ispkg or entry.name == own:
            continue
        module = importlib.import_module(f"{package}.{entry.name}")
        found += [
            (module.__name__, name)
            for name, value in vars(module).items()
            if isinstance(value, FunctionType)
            and hasattr(value, "__wrapped__")
            and value.__module__ == module.__name__
        ]
    return found


# --- batch invariance ---------------------------------------------------------------------------

_ON: ContextVar[bool] = ContextVar("batch_invariant", default=False)


def is_invariant() -> bool:
    """Whether a token's result must not depend on other tokens: ops then use one order of sums for
    it, whatever the number of tokens, rows or chunks around it (docs/batch_invariance.md)."""
    return _ON.get()


@contextmanager
def invariant(on: bool = True) -> Iterator[None]:
    """Ops that run within it are batch invariant, or not."""
    before = _ON.set(on)
    try:
        yield
    finally:
        _ON.reset(before)


def by_token(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a reference whose result has an entry for each entry of the arguments `names`: where ops
    are to be invariant, it runs for one entry at a time on a CPU.

    Torch's CPU kernels choose by shape how they sum, and work on the last few numbers of a tensor
    by other instructions than on the rest. The reference returns a tensor, or a tuple of them. On a
    GPU such ops have one order of sums for each entry by themselves.
    """

    def mark(reference: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(reference)

        @functools.wraps(reference)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not is_invariant():
                return reference(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            rows = {name: given[name] for name in names if given.get(name) is not None}
            first = next(iter(rows.values()))
            if first.is_cuda or len(first) < 2:
                return reference(*args, **kwargs)
            parts = [
                reference(**{**given, **{name: x[i : i + 1] for name, x in rows.items()}})  # type: ignore[call-arg]
                for i in range(len(first))
            ]
            return cast(R, _joined(parts))

        del run.__wrapped__  # it is no op
        return run

    return mark


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return type(first)(*columns) if hasattr(first, "_fields") else tuple(columns)
