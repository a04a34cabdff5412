"""DeepGEMM's kernel in tilings that the library itself does not pick.

Its model of costs lets the blocks of a cluster share no operand where the tiles make one wave. For
512 tokens and weights of 5,120 outputs that leaves the L2 cache as the bound: shared, the weight is
fetched once for two tiles, and a product takes a quarter less. So the kernel's template, which is
in the library's package, is compiled here for such tilings, by nvcc, which the library needs, too.
Cubins are kept beside the library's own cache. Where that fails, or there is no compiler, one
warning says so, and the library decides as it does.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.common.optional import probe
from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu.cuda_source import BFLOAT16, BYTES, FLOAT32, CudaKernel, TensorMap
from millrace.kernels.gpu.device import gpu
from millrace.kernels.gpu.gemm.tiling import BLOCK_K, stages_of
from millrace.kernels.gpu.quantize import launches_early
from millrace.kernels.quantize import Quantized

logger = logging.getLogger("millrace.kernels")

FLAGS = (
    "-std=c++20 -arch=sm_90a -cubin -O3 --expt-relaxed-constexpr --expt-extended-lambda "
    "--diag-suppress=39,161,174,177,186,940"
)
SOURCE = """#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>
using namespace deep_gemm;
static void instantiate() {{
  auto at = reinterpret_cast<void*>(&sm90_fp8_gemm_1d2d_impl<cute::UMMA::Major::K, 0, 0, 0, 1,
      {rows}, {columns}, 128, 128, 128, {swizzle}, {stages}, {fetching}, {multiplying}, 2,
      {on_tokens}, {multiprocessors}, GemmType::Normal, epilogue::transform::EpilogueIdentity>);
}}
"""
LIMIT = 120  # seconds of a compiler
FETCHING = 128  # threads of a block, beside those that multiply
MOST_INPUTS = 32768  # of a weight; scales of a strip lie in shared memory
MOST_SHARED_MEMORY = 227 * 1024

_LOCKS: dict[Tiling, threading.Lock] = defaultdict(threading.Lock)


class Tiling(NamedTuple):
    """rows (tokens) and columns (outputs) of a tile; shared: the operand that the two blocks of a
    cluster fetch together, "weight" or "tokens"."""

    rows: int
    columns: int
    shared: str

    @classmethod
    def parse(cls, text: str) -> Tiling:
        """From "128x160/weight"."""
        found = re.fullmatch(r"(\d+)x(\d+)/(weight|tokens)", text)
        if found is None:
            raise ValueError(f"no tiling {text!r}; one is written as 128x160/weight")
        return cls(int(found[1]), int(found[2]), found[3])

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}/{self.shared}"

    @property
    def swizzle(self) -> int:
        """Bytes of the pattern in which outputs lie in shared memory."""
        return next(size for size in (128, 64, 32, 16) if 2 * self.columns % size == 0)

    @property
    def multiplying(self) -> int:
        """Threads of a block."""
        return 256 if self.rows > 64 else 128

    @property
    def stages(self) -> int:
        return stages_of(self.rows, self.columns, MOST_INPUTS)

    def shared_bytes(self, inputs: int) -> int:
        """Of a block."""
        kinds = 1 if BLOCK_K % self.columns == 0 else 2  # of scales that a tile may need
        stage = BLOCK_K * (self.rows + self.columns) + -(-4 * self.rows // 128) * 128 + 2 * 8
        out = -(-2 * self.rows * self.columns // 1024) * 1024
        return out + self.stages * stage + -(-4 * kinds * (inputs // BLOCK_K) // 8) * 8

    def source(self, multiprocessors: int) -> str:
        return SOURCE.format(
            **self._asdict(), swizzle=self.swizzle, stages=self.stages, fetching=FETCHING,
            multiplying=self.multiplying, on_tokens=str(self.shared == "tokens").lower(),
            multiprocessors=multiprocessors,
        )  # fmt: skip


def cluster_matmul(x: Quantized, weight: Tensor, scale: Tensor, tiling: Tiling) -> Tensor | None:
    """x @ weight^T in bfloat16; None where there is no kernel for the tiling.

    weight: e4m3 [out, in], both multiples of 128; scale: float32 [out / 128, in / 128]; x's scales
    lie as `quantize` on a GPU leaves them.
    """
    kernel = _compiled(tiling) if takes(x, weight, scale) else None
    if kernel is None:
        return None
    (tokens, inputs), outputs = x.values.shape, len(weight)
    out = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=weight.device)
    padded = x.scales.stride(1)
    values = TensorMap.of(
        x.values.data_ptr(), BYTES, (tokens, inputs), inputs, (tiling.rows, BLOCK_K), 128
    )
    scales = TensorMap.of(
        x.scales.data_ptr(), FLOAT32, (inputs // BLOCK_K, padded), 4 * padded, (1, tiling.rows), 0
    )
    outs = TensorMap.of(
        out.data_ptr(), BFLOAT16, (tokens, outputs), 2 * outputs,
        (tiling.rows, tiling.swizzle // 2), tiling.swizzle,
    )  # fmt: skip
    kernel(
        grid=(gpu().multiprocessors, 1, 1), block=(FETCHING + tiling.multiplying, 1, 1),
        args=[scale, 0, tokens, outputs, inputs, values,
              _of_weight(weight.data_ptr(), outputs, inputs, tiling.columns), outs, scales],
        early=launches_early(), shared_bytes=tiling.shared_bytes(inputs), cluster=2,
    )  # fmt: skip
    return out


def takes(x: Quantized, weight: Tensor, scale: Tensor) -> bool:
    """Whether the kernel multiplies these; arguments as in `cluster_matmul`."""
    values, scales = x
    outputs, inputs = weight.shape
    in_order = values.is_contiguous() and weight.is_contiguous() and scale.is_contiguous()
    addresses = [tensor.data_ptr() % 16 for tensor in (values, scales, weight)]
    return (
        outputs % BLOCK_K == 0 and inputs % BLOCK_K == 0 and inputs <= MOST_INPUTS and in_order
        and scales.stride(0) == 1 and scales.stride(1) % 4 == 0 and not any(addresses)
        and scale.dtype == torch.float32 and gpu().multiprocessors % 2 == 0
    )  # fmt: skip


@functools.lru_cache(4096)
def _of_weight(address: int, outputs: int, inputs: int, columns: int) -> TensorMap:
    return TensorMap.of(address, BYTES, (outputs, inputs), inputs, (columns, BLOCK_K), 128)


# --- compiling ---------------------------------------------------------------------------------


def prepare(tilings: Iterable[Tiling]) -> None:
    """Have the kernels of these compiled, beside each other; what fails is a warning, once."""
    wanted = [tiling for tiling in dict.fromkeys(tilings) if gpu().multiprocessors % 2 == 0]
    if wanted:
        with ThreadPoolExecutor(len(wanted)) as pool:
            list(pool.map(cubin_of, wanted))


@remembered
def _compiled(tiling: Tiling) -> CudaKernel | None:
    """None where it cannot be compiled, or loaded."""
    path = cubin_of(tiling)
    if path is None:
        return None
    try:
        return CudaKernel.load(path.read_bytes(), MOST_SHARED_MEMORY)
    except (OSError, RuntimeError) as error:
        _warn(tiling, str(error))
        return None


def cubin_of(tiling: Tiling) -> Path | None:
    """The compiled kernel's file. Threads that want the same one wait for the first of them."""
    with _LOCKS[tiling]:
        return _find_cubin(tiling)


@remembered
def _find_cubin(tiling: Tiling) -> Path | None:
    library, compiler = probe("deep_gemm"), compiler_path()
    file = getattr(library.module, "__file__", None)
    if file is None or compiler is None:
        _warn(tiling, "there is no nvcc" if file else "there is no DeepGEMM")
        return None
    text = tiling.source(gpu().multiprocessors)
    try:
        about = subprocess.run(
            [compiler, "--version"], check=True, capture_output=True, timeout=LIMIT
        ).stdout
        facts = repr((text, FLAGS, about, library.version)).encode()
        folder = Path(os.environ.get("DG_JIT_CACHE_DIR") or Path.home() / ".deep_gemm")
        found = folder / "millrace-kernels" / f"{hashlib.sha256(facts).hexdigest()[:24]}.cubin"
        if not found.is_file():
            found.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, Path(file).parent / "include", text, found)
        return found
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        _warn(tiling, lines[0] if lines else f"nvcc ended with {error.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn(tiling, str(error))
    return None


def _compile(compiler: str, include: Path, text: str, to: Path) -> None:
    """Write the cubin of a source, whole or not at all. Raises OSError and subprocess's errors."""
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        source, out = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(text)
        command = [compiler, *FLAGS.split(), f"-I{include}", "-o", str(out), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=LIMIT)
        out.replace(to)


def compiler_path() -> str | None:
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    for home in (*filter(None, homes), "/usr/local/cuda"):
        if Path(home, "bin", "nvcc").is_file():
            return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def _warn(tiling: Tiling, why: str) -> None:
    logger.warning(
        "FP8 GEMM: no kernel with tiles of %s, so DeepGEMM picks its own: %s", tiling, why[:300]
    )
