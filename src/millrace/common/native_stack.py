"""Work that recurses natively, on a thread with a stack of known size.

llguidance compiles a grammar by recursion in native code; one that is nested too deeply overflows
the stack and ends the process. So a grammar is compiled first with CHECK_STACK in a process whose
death costs nothing, and an engine compiles only what has passed there, with COMPILE_STACK, which is
several times as large. A stack takes memory only as far as it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

CHECK_STACK = 16 << 20  # bytes
COMPILE_STACK = 4 * CHECK_STACK

_Result = TypeVar("_Result")
_size_lock = threading.Lock()


def run_on_stack(size: int, work: Callable[[], _Result]) -> _Result:
    """The result of `work`, run on a new thread with a stack of `size` bytes; raises what it does.

    Raises RuntimeError if the system has no room for the thread.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="native-stack", daemon=True)
    with _size_lock:  # the size holds for every thread that starts meanwhile
        before = threading.stack_size(size)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
