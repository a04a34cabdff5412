"""DeepGEMM's kernels, compiled by child processes into its cache on disk while a start goes on.

The library compiles a kernel when a product first asks for it: one at a time, some seconds each. It
has one for each tiling that it picks, by the weight's shape and the number of tokens. So children
call it on empty tensors of all of these, and whoever needs a kernel later finds it. Each kernel is
compiled once, as far as `tiling` can foretell it, those that most products take first. Two that
compile the same one do not disturb each other: each renames its own directory into place.

What fails here is a warning, and kernels are then compiled where they are used. A marker in the
cache says which products are done; who works on one holds its lock, so of the ranks and replicas
that share a cache one starts children. Knows no model and no step.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import torch

from millrace.common.child_process import (
    child_environment,
    end_with_parent,
    python_module,
    reap,
)
from millrace.common.optional import probe
from millrace.kernels.gpu.gemm.tiling import Kernel, kernel_of
from millrace.kernels.quantize import GROUP, Quantized
from millrace.logs.progress import PROGRESS_SECONDS, Due

logger = logging.getLogger(__name__)

Size = tuple[int, int, int]  # outputs and inputs of an e4m3 weight, tokens
GroupedSize = tuple[int, int, int, int, int]  # the same, with rows; experts; rows of a tile


class Product(NamedTuple):
    """multiprocessors: 0 for all. experts: whose weights there are, `tokens` being the rows of all,
    in tiles of `tile`; 0: one weight."""

    outputs: int
    inputs: int
    tokens: int
    multiprocessors: int
    experts: int = 0
    tile: int = 0


MOST = 14  # children
LIMIT = 60.0  # seconds that a start waits for them once it has nothing else to do
LEAST_FREE = 8 << 30  # bytes of GPU memory; with less there are no children
SHARE = 3  # they take at most one part in so many of what is free
CONTEXT = 768 << 20  # bytes of a process on a GPU, before its tensors
_RECORD = struct.Struct("<6i")


# --- in the process that starts ----------------------------------------------------------------


@contextlib.contextmanager
def compiling(sizes: Collection[Size], grouped: Collection[GroupedSize] = ()) -> Iterator[None]:
    """Compile what products of these sizes need, beside what is within; over when that ends.

    At the end the children are waited for, up to LIMIT; if what is within raises, they are killed.
    Raises nothing of its own.
    """
    children, own = None, None
    try:
        own = _compile_tilings(sizes)
        products = [*grouped_products(grouped), *deep_gemm_products(sizes)]
        if products:
            children = on_this_gpu(products)
    except Exception as error:
        _warn(f"{type(error).__name__}: {error}")
    try:
        yield
        if children is not None:
            children.finish(LIMIT)
        if own is not None:
            own.join(LIMIT)
    finally:
        if children is not None:
            children.close()


def _compile_tilings(sizes: Collection[Size]) -> threading.Thread | None:
    """What compiles the kernels that `clusters` has of these, by nvcc, beside everything else."""
    from millrace.kernels.gpu.gemm import clusters
    from millrace.kernels.gpu.gemm.fp8 import deep_gemm_way

    ways = (deep_gemm_way(tokens, outputs, inputs) for outputs, inputs, tokens in sizes)
    tilings = {clusters.Tiling.parse(way.tiling) for way in ways if way and way.tiling}
    if not tilings:
        return None
    thread = threading.Thread(target=clusters.prepare, args=(tilings,), daemon=True)
    thread.start()
    return thread


def deep_gemm_products(sizes: Collection[Size]) -> list[Product]:
    """Those of the products that go to DeepGEMM on this GPU, neighbours in size far apart."""
    from millrace.kernels.gpu.gemm.fp8 import deep_gemm_way

    products = [
        Product(outputs, inputs, tokens, way.multiprocessors)
        for outputs, inputs, tokens in sorted(set(sizes))
        if (way := deep_gemm_way(tokens, outputs, inputs)) and not way.tiling
    ]
    random.Random(0).shuffle(products)
    return products


def grouped_products(sizes: Collection[GroupedSize]) -> list[Product]:
    """Those with the weights of experts, in front one of each shape, of the most rows."""
    from millrace.kernels.gpu.gemm.fp8 import multiprocessors_of

    first: list[Product] = []
    others: list[Product] = []
    seen: set[tuple[int, ...]] = set()
    for outputs, inputs, rows, experts, tile in sorted(set(sizes), reverse=True):
        shape = outputs, inputs, experts, tile
        product = Product(outputs, inputs, rows, multiprocessors_of(0), experts, tile)
        (others if shape in seen else first).append(product)
        seen.add(shape)
    return [*first, *others]


def one_of_each_kernel_first(products: list[Product]) -> list[Product]:
    """The products in another order: first one for each kernel, those that most products take in
    front, so that no two children compile the same kernel at once.

    Those of experts are in front of all, in their order: their kernels cannot be foretold.

    The others find their kernels. Where they do not, because the library decides otherwise than is
    foretold, neighbours in size share one; so they should be far apart.
    """
    from millrace.kernels.gpu.gemm.fp8 import multiprocessors_of

    users: dict[Kernel, list[Product]] = {}
    grouped = [product for product in products if product.experts]
    products = [product for product in products if not product.experts]
    for product in products:
        outputs, inputs, tokens, multiprocessors = product[:4]
        kernel = kernel_of(tokens, outputs, inputs, multiprocessors_of(multiprocessors))
        users.setdefault(kernel, []).append(product)
    first = [some[0] for some in sorted(users.values(), key=len, reverse=True)]
    seen = set(first)
    return [*grouped, *first, *(one for one in products if one not in seen)]


def on_this_gpu(products: list[Product]) -> Children | None:
    """Children for these on the current GPU; None where that has no room or nothing is to do."""
    free, _ = torch.cuda.mem_get_info()
    compiler = sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("DG_JIT_") or name in ("CUDA_HOME", "CUDA_PATH")
    )
    facts = (probe("deep_gemm").version, torch.version.cuda, torch.cuda.get_device_name(), compiler)
    device = f"cuda:{torch.cuda.current_device()}"
    count = how_many(products, free) if free >= LEAST_FREE else 0
    return start(products, device, count, marker_of(products, facts))


def how_many(products: list[Product], free: int) -> int:
    """Children that `free` bytes of GPU memory and this machine's cores have room for."""
    cores = len(os.sched_getaffinity(0)) - 1  # one is for the process that starts
    room = free // SHARE // (CONTEXT + tensor_bytes(products))
    return max(0, min(MOST, cores, room, len(products)))


def tensor_bytes(products: list[Product]) -> int:
    """GPU memory that a child's tensors may take, in bytes: the largest product's, and a margin."""
    most = max(
        max(experts, 1) * o * i + tokens * (i + 2 * o) for o, i, tokens, _, experts, _ in products
    )
    return most + most // 4 + (64 << 20)


def marker_of(products: list[Product], facts: object) -> Path:
    """The file that says that these products are compiled. facts: what else kernels depend on."""
    cache = os.environ.get("DG_JIT_CACHE_DIR") or Path.home() / ".deep_gemm"
    digest = hashlib.sha256(repr((sorted(products), facts)).encode()).hexdigest()
    return Path(cache, "millrace", digest[:24])


def start(products: list[Product], device: str, count: int, marker: Path) -> Children | None:
    """Start `count` children; None if the marker says that they are not needed. Raises OSError."""
    if not count:
        if not (marker.is_file() and marker.stat().st_size):
            _warn("there is no core, or no GPU memory, for another process")
        return None
    claimed = _claim(marker)
    if claimed is None:
        return None
    logger.info("%d products of DeepGEMM are compiled by %d processes", len(products), count)
    return Children(one_of_each_kernel_first(products), device, count, claimed)


def _claim(path: Path) -> IO[bytes] | None:
    """The marker, locked until it is closed; None if it is complete, or somebody else's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marker = path.open("a+b", buffering=0)
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        marker.seek(0)
        if not marker.read():
            return marker
    except BlockingIOError:
        pass
    except BaseException:
        marker.close()
        raise
    marker.close()
    return None


class Children:
    """Processes that take products from one file, whose offset they share, until none is left."""

    def __init__(self, products: list[Product], device: str, count: int, marker: IO[bytes]) -> None:
        self._marker, self._count = marker, len(products)
        self._work = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.processes: list[subprocess.Popen[bytes]] = []
        memory = str(tensor_bytes(products))
        command = python_module(__name__, str(os.getpid()), device, memory)
        try:
            self._work.write(b"".join(_RECORD.pack(*product) for product in products))
            self._work.seek(0)
            for _ in range(count):
                self.processes.append(self._start(command))
        except BaseException:
            self.close()
            raise

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=self._work,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=child_environment(OMP_NUM_THREADS="1"),
            start_new_session=True,  # the group has the compilers that it starts
        )

    def finish(self, limit: float) -> None:
        """Wait `limit` seconds for them, then end those that are left; all are gone afterwards."""
        began = time.monotonic()
        self._report_until_done(began + limit)
        late = reap(self.processes, max(0.0, began + limit - time.monotonic()), groups=True)
        failed = sum(process.returncode != 0 for process in self.processes) - late
        if not late + failed:
            with contextlib.suppress(OSError):  # without it the next start looks again
                self._marker.write(b"complete\n")
            logger.info("waited %.1f s for DeepGEMM's kernels", time.monotonic() - began)
        else:
            total = len(self.processes)
            _warn(f"of {total} processes {failed} failed, {late} took too long{self._last_line()}")

    def _report_until_done(self, deadline: float) -> None:
        """Wait for the processes, with a line of progress now and then."""
        due = Due(PROGRESS_SECONDS)
        for process in self.processes:
            while process.poll() is None and (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, PROGRESS_SECONDS))
                if due:
                    # The processes share the file's offset: what they have taken from it.
                    taken = os.lseek(self._work.fileno(), 0, os.SEEK_CUR) // _RECORD.size
                    logger.info("DeepGEMM's kernels: %d of %d are begun", taken, self._count)

    def close(self) -> None:
        """End all of them, whatever they do."""
        reap(self.processes, 0.0, groups=True)
        for file in (self._work, self._output, self._marker):
            file.close()

    def _last_line(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - 2000))
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return f"; the last one wrote: {lines[-1][:300]}" if lines else ""


def _warn(what: str) -> None:
    logger.warning(
        "DeepGEMM's kernels were not all compiled ahead, so they are when first used: %s", what
    )


# --- in a child --------------------------------------------------------------------------------


def main(parent: int, device: str, memory: int) -> None:
    """Compile products from stdin until there is none. memory: bytes that tensors may take."""
    end_with_parent(parent)
    os.nice(5)  # the start itself goes first
    if device != "cpu":
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total))
    while record := os.read(sys.stdin.fileno(), _RECORD.size):
        multiply_nothing(Product(*_RECORD.unpack(record)), torch.device(device))
        if device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # else the next product's sizes might not fit between these


def multiply_nothing(product: Product, device: torch.device) -> None:
    """A product of these sizes on memory as it is found."""
    from millrace.kernels.gpu.gemm.fp8 import deep_gemm_matmul
    from millrace.kernels.gpu.gemm.grouped import grouped_matmul
    from millrace.kernels.gpu.quantize import empty_quantized

    outputs, inputs, tokens, multiprocessors, experts, tile = product
    x: Quantized = empty_quantized(tokens, inputs, device)
    if experts:
        sizes = experts, outputs, inputs
        weight = torch.empty(sizes, dtype=torch.float8_e4m3fn, device=device)
        blocks = experts, outputs // GROUP, inputs // GROUP
        scale = torch.empty(blocks, dtype=torch.float32, device=device)
        nobody = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        grouped_matmul(x, weight, scale, nobody, tile, multiprocessors)
        return
    weight = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(outputs // GROUP, inputs // GROUP, dtype=torch.float32, device=device)
    deep_gemm_matmul(x, weight, scale, multiprocessors)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
