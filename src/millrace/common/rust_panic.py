"""Panics of Rust libraries, which reach Python as an exception that is no `Exception`."""

from __future__ import annotations


def is_library_failure(error: BaseException) -> bool:
    """Whether a native library failed: it raised an `Exception`, or its Rust code panicked."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
