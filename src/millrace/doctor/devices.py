"""Devices, the native library, and the implementation that each op uses."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator

from millrace.doctor.finding import Finding

GiB = 1 << 30


def devices() -> Iterator[Finding]:
    """PyTorch and the GPUs that it sees."""
    import torch

    built = torch.version.cuda
    yield Finding("devices", "torch", f"{torch.__version__}, {'CUDA ' + built if built else 'CPU'}")
    yield Finding("devices", "threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS sets it)")
    if not torch.cuda.is_available():
        yield Finding("devices", "gpu", "none; engines run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        busy = free < 0.9 * total
        yield Finding(
            "devices", f"gpu {index}",
            f"{facts.name}, compute {facts.major}.{facts.minor}, "
            f"{free / GiB:.1f} GiB free of {total / GiB:.1f}",
            "warn" if busy else "ok",
            "another program uses its memory" if busy else "",
        )  # fmt: skip


def has_hopper() -> bool:
    """Whether the GPU that an engine would use is a Hopper GPU."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def kernels() -> Iterator[Finding]:
    """The implementation of each op on the device that an engine would use."""
    import torch

    from millrace.kernels.dispatch import all_ops

    if torch.cuda.is_available():
        triton = _triton()
        yield triton
        yield from backends() if triton.verdict == "ok" else ()
        device, native = "gpu", True
    else:
        compiled = native_library()
        yield compiled
        device, native = "cpu", compiled.verdict == "ok"
    for module, name in all_ops():
        yield _path(device, native, module, name)


def native_library() -> Finding:
    from millrace.kernels.cpu import build

    if not build.is_enabled():
        return Finding("kernels", "native library", "turned off by MILLRACE_NATIVE=0", "warn")
    try:
        path = build.build()
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return Finding(
            "kernels", "native library", f"cannot be compiled: {said[0] if said else error}",
            "warn", "torch's kernels run instead, which are slower; install a C++17 compiler (g++)",
        )  # fmt: skip
    if build.library() is None:
        return Finding("kernels", "native library", f"{path} cannot be loaded", "warn")
    return Finding("kernels", "native library", str(path))


def _triton() -> Finding:
    """Triton, in which the fast paths on a GPU are written."""
    try:
        module = importlib.import_module("triton")
    except ImportError as error:
        advice = "install the CUDA build of PyTorch, which brings it"
        return Finding("kernels", "triton", f"cannot be imported ({error})", "fail", advice)
    return Finding("kernels", "triton", str(module.__version__))


def backends() -> Iterator[Finding]:
    """The backends of ops that have several of them on this GPU, at the shapes of the 27B model,
    and for experts of the 35B model."""
    import torch

    from millrace.kernels.gpu.gdn.decode import Shape
    from millrace.runtime import kernel_report

    low = (True,) * 6
    for choice in kernel_report.backends(
        torch.bfloat16,
        [(5120, 5120)],
        Shape(2, 16, 128, 128, 3, *low),
        experts=[(257, 2048, 512)],
    ):
        value = choice.backend + (f"; {choice.reason}" if choice.reason else "")
        yield Finding("kernels", choice.op, value, "warn" if choice.remedy else "ok", choice.remedy)


def _path(device: str, native: bool, module: str, name: str) -> Finding:
    from millrace.kernels.dispatch import find_fast_path

    topic, leaf = "kernels", f"{module.rpartition('.')[2]}.{name}"
    try:
        fast = find_fast_path(device, module, name)
    except ImportError as error:
        return Finding(topic, leaf, f"its fast path cannot be imported: {error}", "fail")
    if fast is None:
        return Finding(topic, leaf, "torch reference")
    if not native:
        return Finding(topic, leaf, "torch reference, because the native library is missing")
    return Finding(topic, leaf, f"{fast.__module__}")
