"""The fastest FP8 GEMM backend on this GPU, for each weight shape and number of tokens.

    python benchmarks/gemm_choice_h200.py      # into kernels/gpu/gemm/measured/DEVICE.json
    python benchmarks/gemm_choice_h200.py --shapes 5120x6144 --tokens 512,1920 --print

Measures cuBLAS, and DeepGEMM with several numbers of multiprocessors, which make it choose other
tiles, and in clusters that it would not pick (TILINGS); in CUDA graphs over copies of the weight
that exceed the L2 cache. The results of the backends are compared with each other at every size.
All backends of a size take turns, so that clocks that fall at the power limit affect all of them.
The default backend is kept unless another is 2% faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import commit

from millrace.kernels.gpu.gemm import choice, clusters, fp8
from millrace.kernels.gpu.gemm.choice import GemmBackend
from millrace.kernels.gpu.gemm.clusters import Tiling
from millrace.kernels.gpu.gemm.prebuild import multiply_nothing
from millrace.kernels.gpu.quantize import quantize
from millrace.kernels.quantize import Quantized

MEASURED = Path(choice.__file__).parent / "measured"
# Of Qwen3.5-27B: GDN and attention inputs, their outputs, MLP, keys and values alone, vocabulary.
SHAPES = [(16384, 5120), (14336, 5120), (5120, 6144), (34816, 5120), (5120, 17408), (2048, 5120)]
VOCABULARY = (248320, 5120)  # of drafts, one token a row
MOST_ROWS = 512
SMALL = [16, 24, 32, 48, 64, 96, 128, 192, 256]
TOKENS = [*SMALL, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, *range(1024, 3073, 128)]
MULTIPROCESSORS = (0, 128, 124, 120, 112)
TILINGS = ("128x160/weight", "128x160/tokens", "128x128/weight", "256x128/weight")
GAIN = 0.98  # of the default's time, to be taken instead of it
CACHE = 120 << 20  # bytes of weights that fall out of the L2 cache
AT_ONCE = 30  # processes that compile

Run = Callable[[Quantized, Tensor, Tensor], Tensor]
Shape = tuple[int, int]  # outputs, inputs


def run_of(way: GemmBackend) -> Run:
    if way.library == "cublas":
        return fp8.cublas_matmul
    if way.tiling:
        return lambda x, w, s: clustered(x, w, s, Tiling.parse(way.tiling))
    return lambda x, w, s: fp8.deep_gemm_matmul(x, w, s, way.multiprocessors)


def clustered(x: Quantized, w: Tensor, s: Tensor, tiling: Tiling) -> Tensor:
    out = clusters.cluster_matmul(x, w, s, tiling)
    if out is None:
        raise SystemExit(f"tiles of {tiling} cannot be compiled, or do not take these tensors")
    return out


def candidates(tokens: int) -> list[GemmBackend]:
    """tokens: fewer than 256 do not fill the tiles of clusters."""
    found = [*(GemmBackend("deep_gemm", count) for count in MULTIPROCESSORS), choice.CUBLAS]
    return found + [GemmBackend("deep_gemm", 0, text) for text in TILINGS if tokens > 256]


def weight(outputs: int, width: int) -> tuple[Tensor, Tensor]:
    values = torch.randn(outputs, width, device="cuda").mul(100).clamp(-448, 448)
    scale = torch.rand(outputs // 128, width // 128, device="cuda") * 0.01 + 0.01
    return values.to(torch.float8_e4m3fn), scale


def activations(tokens: int, width: int) -> Quantized:
    return quantize(torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16))


# --- compiling ahead, in processes beside each other -------------------------------------------


def compile_all(shapes: list[Shape], tokens: list[int]) -> None:
    """DeepGEMM's kernels of every size, into its cache on disk."""
    todo = [(shape, count) for shape in shapes for count in MULTIPROCESSORS]
    sizes = ",".join(map(str, tokens))
    began = time.perf_counter()
    while todo:
        some, todo = todo[:AT_ONCE], todo[AT_ONCE:]
        processes = []
        for (outputs, width), count in some:
            what = ["--compile", str(count), "--shapes", f"{outputs}x{width}", "--tokens", sizes]
            processes.append(subprocess.Popen([sys.executable, __file__, *what]))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"processes that compile ended with {codes}")
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)


def compile_some(shape: Shape, tokens: list[int], multiprocessors: int) -> None:
    for count in tokens:
        multiply_nothing((*shape, count, multiprocessors), torch.device("cuda"))
    torch.cuda.synchronize()


# --- measuring ---------------------------------------------------------------------------------


def graph_of(
    run: Run, x: Quantized, copies: list[tuple[Tensor, Tensor]], calls: int
) -> Callable[[], None]:
    """Replays `calls` products, on one copy of the weight after the other."""
    graph = torch.cuda.CUDAGraph()
    run(x, *copies[0])
    with torch.cuda.graph(graph):
        for call in range(calls):
            run(x, *copies[call % len(copies)])
    return graph.replay


def microseconds(replay: Callable[[], object], calls: int, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls / repeats


def measure(
    shape: Shape, tokens: int, copies: list[tuple[Tensor, Tensor]]
) -> dict[GemmBackend, float]:
    """Microseconds of each way, the median of five turns. Raises SystemExit if one is wrong."""
    outputs, width = shape
    x = activations(tokens, width)
    calls = max(4, len(copies))
    reference = fp8.cublas_matmul(x, *copies[0]).float()
    replays = {}
    for way in candidates(tokens):
        run = run_of(way)
        error = (run(x, *copies[0]).float() - reference).norm() / reference.norm()
        if not error < 5e-3:
            raise SystemExit(f"{way} is wrong at {tokens} tokens of {shape}: {error:.2g}")
        replays[way] = graph_of(run, x, copies, calls)
    times: dict[GemmBackend, list[float]] = {way: [] for way in replays}
    for _ in range(6):
        for way, replay in replays.items():
            repeats = max(1, int(4e-3 / (calls * 2.0 * tokens * outputs * width / 1e15)))
            times[way].append(microseconds(replay, calls, min(repeats, 20)))
    return {way: statistics.median(found[1:]) for way, found in times.items()}


def fastest(times: dict[GemmBackend, float], default: GemmBackend) -> GemmBackend:
    best = min(times, key=lambda way: times[way])
    return best if times[best] < GAIN * times[default] else default


def merged(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Without the bounds that a neighbour above of the same way makes needless."""
    pairs = zip(lines, [*lines[1:], (0, "")], strict=True)
    return [line for line, above in pairs if line[1] != above[1]]


def table_of(shape: Shape, tokens: list[int]) -> list[tuple[int, str]]:
    outputs, width = shape
    copies = [weight(*shape) for _ in range(max(1, -(-CACHE // (outputs * width))))]
    lines = []
    for count in tokens:
        times = measure(shape, count, copies)
        default = choice._rule(count, outputs)
        way = fastest(times, default)
        lines.append((count, str(way)))
        shown = {str(w): round(t, 1) for w, t in times.items()}
        gain = times[default] / times[way]
        print(f"{outputs}x{width} {count}: {way!s} ({gain:.2f}) {shown}", flush=True)
    return merged(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", help="as 5120x6144,..., outputs first")
    parser.add_argument("--tokens", help="as 512,1024,...")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = options.shapes.split(",") if options.shapes else []
    shapes = [shape_of(text) for text in given] or [*SHAPES, VOCABULARY]
    tokens = [int(count) for count in options.tokens.split(",")] if options.tokens else TOKENS
    if options.compile is not None:
        compile_some(shapes[0], tokens, options.compile)
        return
    clusters.prepare(Tiling.parse(text) for text in TILINGS)
    compile_all(shapes, tokens)
    few = [count for count in tokens if count <= MOST_ROWS]
    found = {
        f"{shape[0]}x{shape[1]}": table_of(shape, few if shape == VOCABULARY else tokens)
        for shape in shapes
    }
    device = torch.cuda.get_device_name()
    same = {"device": device, "commit": commit(), "torch": torch.__version__}
    if not options.print:
        path = options.out or MEASURED / f"{device.replace(' ', '_')}.json"
        old = json.loads(path.read_text())["fp8_products"] if path.exists() else {}
        path.write_text(json.dumps({**same, "fp8_products": old | found}, indent=1) + "\n")


def shape_of(text: str) -> Shape:
    outputs, width = map(int, text.split("x"))
    return outputs, width


if __name__ == "__main__":
    main()
