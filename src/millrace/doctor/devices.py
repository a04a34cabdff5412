"""What computes here: devices, the native library, and the path that each op takes."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
from collections.abc import Iterator
from types import FunctionType, ModuleType

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
            "another program holds memory of it" if busy else "",
        )  # fmt: skip


def kernels() -> Iterator[Finding]:
    """For each op, what runs it on the device that an engine would take."""
    import torch

    if torch.cuda.is_available():
        yield from _gpu_libraries()
        device, native = "gpu", True
    else:
        compiled = _native()
        yield compiled
        device, native = "cpu", compiled.verdict == "ok"
    for module in _op_modules():
        for name in _ops(module):
            yield _path(device, native, module.__name__, name)


def _native() -> Finding:
    from millrace.kernels.cpu import build

    if not build.switched_on():
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


def _gpu_libraries() -> Iterator[Finding]:
    """What the fast paths import; without an optional one another path runs."""
    for name, package, needed in (
        ("triton", "triton", True),
        ("DeepGEMM", "deep_gemm", False),
    ):
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            yield Finding(
                "kernels", name, f"not there ({error})", "fail" if needed else "warn",
                "" if needed else "pip install 'millrace[gpu]' makes FP8 products faster",
            )  # fmt: skip
        else:
            yield Finding("kernels", name, str(getattr(module, "__version__", "there")))


def _op_modules() -> Iterator[ModuleType]:
    import millrace.kernels

    for found in pkgutil.iter_modules(millrace.kernels.__path__):
        if not found.ispkg and found.name != "dispatch":
            yield importlib.import_module(f"millrace.kernels.{found.name}")


def _ops(module: ModuleType) -> list[str]:
    """The ops of one module: its functions that `dispatch.op` has wrapped."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, FunctionType)
        and hasattr(value, "__wrapped__")
        and value.__module__ == module.__name__
    ]


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
        return Finding(topic, leaf, "torch reference, for want of the native library")
    return Finding(topic, leaf, f"{fast.__module__}")
