"""Every kernel compiles for a Hopper GPU, at the arguments that the launchers give it.

Needs no GPU: the launchers run on tensors without memory, and each launch ends after compilation.
CUDA sources go through NVIDIA's run-time compiler, as they do where they are used. Triton's
interpreter, in which the other tests run its kernels on a CPU, takes programs that its compiler
refuses.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.kernels.batch import Batch, DecodeRows, GDNState, KVCache, PrefillRows
from tests.kernels.gpu.gpu_support import HAS_TRITON, INTERPRETED
from tests.kernels.gpu.machine_code import disassembled, overwritten_operands

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")

SHARED_MEMORY = 227 * 1024  # bytes that a block may have on a Hopper GPU
OPERAND_IN_REGISTERS = re.compile(r"wgmma\.mma_async[^;]*\{[^;{]*\{")  # the first is the result
BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
DECODE, PROMPT = 8, 200  # rows of a decode step, tokens of a prompt


@dataclass(frozen=True)
class Shape:
    """What of a model's config reaches kernels."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    key_heads: int
    value_heads: int
    vocabulary: int
    kv: torch.dtype
    state: torch.dtype
    head_dim: int = 256
    gdn_dim: int = 128
    rotary_dim: int = 64
    gated: bool = True  # attention has output gates

    @property
    def channels(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.gdn_dim


MINI = Shape(256, 512, 4, 2, 2, 4, 4096, kv=BF16, state=F32)
LARGE = Shape(5120, 17408, 24, 4, 16, 48, 248320, kv=FP8, state=BF16)  # the 27B model
# Qwen3 of 8B, 14B and 32B: groups of 4, 5 and 8 query heads, and no recurrence.
DENSE = {
    f"qwen3-{heads}-{kv}": Shape(
        hidden, 12288, heads, 8, 0, 0, 151936, kv=kv, state=F32, head_dim=128, rotary_dim=128,
        gated=False,
    )
    for hidden, heads, kv in ((4096, 32, FP8), (5120, 40, BF16), (5120, 64, FP8), (5120, 64, BF16))
}  # fmt: skip


class Compiler:
    """Stands in for Triton's driver of a GPU, and notes which kernels were compiled for it."""

    def __init__(self) -> None:
        self.shared: dict[str, int] = {}  # bytes a block of each kernel takes, at most
        self.forms: dict[str, set[str]] = {}  # by kernel: what was compiled of it
        self.code: dict[str, list[str]] = {}  # by kernel: the PTX of each form
        self.overwritten: dict[str, list[str]] = {}  # by kernel: instructions that may not be there

    def get_current_device(self) -> int:
        return -1  # no other test's

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def note(self, kernel: Any) -> None:
        name, shared = kernel.metadata.name, kernel.metadata.shared
        self.shared[name] = max(self.shared.get(name, 0), shared)
        self.forms.setdefault(name, set()).add(kernel.hash)
        self.code.setdefault(name, []).append(kernel.asm["ptx"])
        if OPERAND_IN_REGISTERS.search(kernel.asm["ptx"]):
            lost = overwritten_operands(disassembled(kernel.asm["cubin"]))
            self.overwritten |= {name: lost} if lost else {}


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """Launches compile, as far as machine code, and do not run. No operand is lost."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    fake, real_run = Compiler(), JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        fake.note(real_run(self, *args, warmup=True, **options))

    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(JITFunction, "run", run)
    yield fake
    assert fake.overwritten == {}


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def decode_rows(width: int) -> DecodeRows:
    rows = empty(DECODE, dtype=torch.int64)
    return DecodeRows(rows, rows, width, 1000)


def prefill_rows(prompts: int = 1) -> PrefillRows:
    rows, offsets = empty(prompts, dtype=torch.int64), empty(prompts + 1, dtype=torch.int32)
    return PrefillRows(rows, rows, offsets, (PROMPT,) * prompts, (0,) * prompts)


def padded_rows() -> PrefillRows:
    """As a graph's, of whose lengths the host knows a bound alone."""
    rows, offsets = empty(8, dtype=torch.int64), empty(9, dtype=torch.int32)
    return PrefillRows(rows, rows, offsets, None, None, 4096)


def gdn_state(shape: Shape, width: int, window: int = 16) -> GDNState:
    keys, values, dim = shape.key_heads, shape.value_heads, shape.gdn_dim
    return GDNState(
        empty(9, values, dim, dim, dtype=shape.state),
        empty(9, keys, window, dim, dtype=shape.state),
        empty(9, values, window, dim, dtype=F32),
        empty(9, values, window, dtype=F32),
        empty(9, 2 + width, shape.channels),
    )


def gdn(shape: Shape) -> None:
    from millrace.kernels.gpu.gdn import conv, decode, prefill

    slots, heads = empty(9, dtype=torch.int32), shape.value_heads
    biases = empty(heads, dtype=F32), empty(heads, dtype=F32)
    taps = empty(shape.channels, 4)
    for width in (1, 2) if shape is LARGE else (2,):
        cache, rows, tokens = gdn_state(shape, width), decode_rows(width), DECODE * width
        wide = empty(tokens, shape.channels + heads * shape.gdn_dim)
        conv.conv_decode(wide[:, : shape.channels], cache, taps, rows, slots)
        a, b = empty(tokens, 2 * heads).split(heads, -1)
        qkv = empty(tokens, shape.channels)
        decode.launch(qkv, a, b, biases, cache, slots, rows)
    a, b = empty(PROMPT, 2 * heads).split(heads, -1)
    g, beta = conv.gates(a, b, *biases)
    wide = empty(PROMPT, shape.channels + heads * shape.gdn_dim)
    qkv = conv.conv_prefill(wide[:, : shape.channels], cache, taps, prefill_rows(), slots)
    for rows in (prefill_rows(), prefill_rows(3), padded_rows()):
        prefill.gdn_prefill(qkv, g, beta, cache, rows)


def attention(shape: Shape) -> None:
    from millrace.kernels.gpu import attention as gpu
    from millrace.kernels.gpu import rope
    from millrace.kernels.gpu.attention import prefill

    dim, kv_heads = shape.head_dim, shape.kv_heads
    pages = (50, 64, kv_heads, dim)
    cache = KVCache(empty(*pages, dtype=shape.kv), empty(*pages, dtype=shape.kv))
    table = empty(9, 16, dtype=torch.int32)
    places, angles = empty(PROMPT, dtype=torch.int64), empty(4096, shape.rotary_dim, dtype=F32)
    queries = shape.heads * dim
    widths = [queries, queries if shape.gated else 0, kv_heads * dim, kv_heads * dim]
    weight = empty(dim)
    q = gpu.norm_rope_store(
        empty(PROMPT, sum(widths)), widths, weight, weight, 1e-6, places, angles, cache, places
    )
    widths[:2] = 0, 0  # keys and values alone
    gpu.norm_rope_store(
        empty(PROMPT, sum(widths)), widths, weight, weight, 1e-6, places, angles, cache, places
    )
    gpu.attend_prefill(q, cache, table, prefill_rows(), 1 / 16)
    gpu.attend_prefill(q, cache, table, prefill_rows(), 1 / 16, widen=False)
    gpu.attend_prefill(q, cache, table, padded_rows(), 1 / 16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefill, "BOXES", False)
        gpu.attend_prefill(q, cache, table, padded_rows(), 1 / 16)
    for width in (1, 2) if shape is LARGE else (2,):
        gpu.attend_decode(q[: DECODE * width], cache, table, decode_rows(width), 1 / 16)
    k, v = empty(PROMPT, 2 * kv_heads, dim).split(kv_heads, 1)
    gpu.store_kv(k, v, cache, places)
    rope.apply_rope(q, places, angles)


def fixed(shape: Shape) -> None:
    """What is batch invariant."""
    from millrace.kernels.dispatch import invariant
    from millrace.kernels.gpu import attention, gemm
    from millrace.kernels.gpu.gdn import fixed as recurrence

    dim, kv_heads = shape.head_dim, shape.kv_heads
    cache = KVCache(*(empty(50, 64, kv_heads, dim, dtype=shape.kv) for _ in "kv"))
    table, tokens = empty(9, 16, dtype=torch.int32), DECODE * 2 + PROMPT
    places = empty(tokens, dtype=torch.int64)
    batch = Batch(places, places, places, decode_rows(2), padded_rows(), padded=True)
    with invariant():
        attention.attend(empty(tokens, shape.heads, dim), cache, table, batch, 1 / 16)
        gemm.fixed_linear(empty(tokens, shape.hidden), empty(shape.intermediate, shape.hidden))
    if not shape.value_heads:
        return
    state, slots, heads = gdn_state(shape, 2), empty(9, dtype=torch.int32), shape.value_heads
    keys = empty(*state.window_k.shape, dtype=F32)
    state = GDNState(state.state, keys, state.window_u, state.window_g, state.conv)
    biases = empty(heads, dtype=F32), empty(heads, dtype=F32)
    a, b = empty(tokens, 2 * heads).split(heads, -1)
    x = empty(tokens, shape.channels)
    taps = empty(shape.channels, 4)
    recurrence.gdn_of_batch(x, taps, a, b, biases, state, slots, slots, batch)


def between_products(shape: Shape) -> None:
    from millrace.kernels.gpu import quantize
    from millrace.kernels.gpu.all_reduce import PeerMemory, one_shot, one_shot_norm

    x, weight = empty(DECODE, shape.hidden), empty(shape.hidden)
    quantize.quantize(x)
    quantize.rms_norm_quantize(x, None, weight, 1e-6, keep=True)
    quantize.rms_norm_quantize(x, x, weight, 1e-6, keep=False)
    quantize.norm(x, x, weight, 1e-6)
    gate_up = empty(DECODE, 2 * shape.intermediate)
    quantize.silu_mul_quantize(gate_up)
    quantize.pointwise(quantize.SILU_MUL, gate_up, gate_up, shape.intermediate)
    attended = empty(DECODE, shape.heads * shape.head_dim)
    quantize.sigmoid_gate_quantize(attended, attended)
    if shape.value_heads:
        o = empty(DECODE, shape.value_heads, shape.gdn_dim)
        quantize.gated_rms_norm_quantize(o, o, empty(shape.gdn_dim), 1e-6)

    addresses, calls = empty(2, dtype=torch.int64), empty(64, dtype=torch.int32)
    memory = PeerMemory(0, 2, 64, shape.hidden, addresses, addresses, calls)
    one_shot(x, memory)
    one_shot_norm(x, x, weight, 1e-6, memory, keep=True)
    one_shot_norm(x, x, weight, 1e-6, memory, keep=False, quantized=True)


def products(shape: Shape) -> None:
    from millrace.kernels.gpu import quantize
    from millrace.kernels.gpu.gemm import fp8

    weight = empty(2 * shape.intermediate, shape.hidden, dtype=FP8)
    scale = empty(*(size // 128 for size in weight.shape), dtype=F32)
    for tokens in (2, 512):
        x = quantize.quantize(empty(tokens, shape.hidden))
        fp8.triton_matmul(x, weight, scale, BF16)


def w4_products(shape: Shape) -> None:
    from millrace.kernels.gemm import W4
    from millrace.kernels.gpu.gemm import w4

    outputs, inputs = shape.hidden, shape.intermediate
    codes, factor = empty(outputs, inputs // 8, dtype=torch.int32), empty(outputs, 1, dtype=F32)
    for group, kind in ((128, "symmetric"), (32, "zeros"), (16, "floats")):
        scales = empty(outputs, inputs // group, dtype=torch.float16)
        zeros = empty(outputs, inputs // group, dtype=torch.uint8) if kind == "zeros" else None
        weight = W4(codes, scales, factor, zeros, group, kind == "floats")
        for tokens in (9, 512) if group == 128 else (32,):
            w4.triton_matmul(empty(tokens, inputs), weight)
        w4.dequantized(weight, BF16)


def sampling(shape: Shape) -> None:
    from millrace.kernels.gpu import sampling as gpu

    floats, integers = empty(DECODE, dtype=F32), empty(DECODE, dtype=torch.int64)
    logits = empty(DECODE, shape.vocabulary, dtype=F32)
    gpu.best(logits, floats, integers, integers, 8)
    for noise, filters in ((False, False), (True, True)):
        gpu.sample(
            logits, floats, floats, integers, integers, integers, noise=noise, filters=filters
        )


def snapshots(shape: Shape) -> None:
    from millrace.kernels.gpu import copy

    dim, heads = shape.gdn_dim, shape.value_heads
    records, states = (empty(3, n, heads, dim, dim, dtype=shape.state) for n in (5, 9))
    rows = empty(2, dtype=torch.int64)
    copy.copy_rows(records, rows, states, rows)
    copy.copy_rows(empty(3, 5, 3, shape.channels), rows, empty(3, 9, 4, shape.channels), rows)


def drafts(shape: Shape) -> None:
    from millrace.kernels.gpu import lookup

    rows = empty(DECODE, dtype=torch.int64)
    for context, longest in ((200, 5), (40_000, 24)):
        tape = empty(9, context + 8, dtype=torch.int64)
        lookup.longest_match(tape, rows, rows, longest, context)


def experts(shape: Shape) -> None:
    """Of the 35B model's width, with weights in e4m3 and bfloat16."""
    from millrace.kernels.gpu.moe import routing, rows, tile_config, tiles
    from millrace.kernels.gpu.moe.combine import combine
    from millrace.kernels.moe import ExpertWeights, Shared
    from millrace.kernels.quantize import Quantized

    count, top_k, hidden, width = 256, 8, 2048, 512
    for tokens in (DECODE, 256, 1024, 4096):
        routes = routing.route(empty(tokens, count), top_k, True)
        for kind in (FP8, BF16):
            first, last = (
                ExpertWeights(
                    empty(*sizes, dtype=kind),
                    empty(sizes[0], sizes[1] // 128, sizes[2] // 128, dtype=F32),
                )
                for sizes in ((count, 2 * width, hidden), (count, hidden, width))
            )
            x = empty(tokens, hidden)
            scales = empty(hidden // 128, tokens, dtype=F32).t()
            q = Quantized(empty(tokens, hidden, dtype=FP8), scales) if kind == FP8 else x
            config = tile_config(tokens * top_k, count, BF16, kind == FP8)
            groups = routing.group(routes.experts, count, config.rows)
            made = tiles.down(
                tiles.gate_up(q, groups, first, top_k, config), groups, last, BF16, config
            )
        combine(made, groups.rows, routes.weights, Shared(x, empty(tokens, 1)))
        combine(made, routes.experts, routes.weights, None, placed=False)
    routing.group_in_triton(routes.experts, count, groups)
    groups = routing.group(routes.experts, count, 128)
    rows.gather(Quantized(empty(tokens, hidden, dtype=FP8), scales), groups, top_k)
    rows.silu_mul_quantize_rows(empty(len(groups.experts), 2 * width), groups)


PARTS: list[Callable[[Shape], None]] = [
    fixed,
    gdn,
    attention,
    between_products,
    products,
    experts,
    w4_products,
    sampling,
    snapshots,
    drafts,
]


def test_overwritten_operands_are_found() -> None:
    loop = [
        ".L_x_1:",
        "/*0010*/ FADD R89, R19, 1 ;",
        "/*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
        "/*0030*/ MOV R88, R2 ;",
        "/*0040*/ HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR20], R24, gsb0 ;",
        "/*0050*/ @P1 BRA `(.L_x_1);",
    ]
    assert overwritten_operands(loop) == ["FADD R89, R19, 1 "]
    loop[1], loop[2] = loop[2], loop[1]
    assert overwritten_operands(loop) == []
    loop[4] = loop[4].replace("R88, gdesc", "gdesc[UR8], gdesc")  # from shared memory
    assert overwritten_operands([*loop[:1], *loop[3:]]) == []


@pytest.mark.parametrize("shape", [MINI, LARGE], ids=["mini", "large"])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_compiles(part: Callable[[Shape], None], shape: Shape, compiler: Compiler):
    part(shape)
    assert compiler.shared
    assert {n: size for n, size in compiler.shared.items() if size > SHARED_MEMORY} == {}


def test_what_launches_the_product_behind_it_compiles(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
):
    from millrace.kernels.gpu import quantize

    monkeypatch.setattr(quantize, "CHAINED_LAUNCHES", False)
    between_products(LARGE)
    forms = {name: len(found) for name, found in compiler.forms.items()}
    monkeypatch.setattr(quantize, "launches_early", lambda: True)
    between_products(LARGE)
    more = {name: len(found) - forms[name] for name, found in compiler.forms.items()}
    # Of five pointwise and three norm kernels those that quantise; the others stay as they are.
    assert (more["_pointwise_kernel"], more["_norm_kernel"]) == (4, 2)
    monkeypatch.setattr(quantize, "CHAINED_LAUNCHES", True)
    between_products(LARGE)
    more = {name: len(found) - forms[name] for name, found in compiler.forms.items()}
    # And of these the one of silu, and both norms, once more.
    assert (more["_pointwise_kernel"], more["_norm_kernel"]) == (5, 4)


@pytest.mark.parametrize("shape", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("part", [attention, between_products], ids=lambda part: part.__name__)
def test_compiles_without_recurrence(
    part: Callable[[Shape], None], shape: Shape, compiler: Compiler
):
    test_compiles(part, shape, compiler)


def test_any_number_of_prompts_is_one_kernel(compiler: Compiler):
    """Else the first step of so many waits for a compiler."""
    from millrace.kernels.gpu import attention as gpu

    pages = empty(50, 64, LARGE.kv_heads, LARGE.head_dim, dtype=FP8)
    cache, table = KVCache(pages, pages), empty(9, 16, dtype=torch.int32)
    for prompts in (1, 3, 70):
        q = empty(prompts * PROMPT, LARGE.heads, LARGE.head_dim)
        gpu.attend_prefill(q, cache, table, prefill_rows(prompts), 1 / 16, widen=True)
    assert {name: len(forms) for name, forms in compiler.forms.items()} == {
        "_prefill_kernel": 1,
        "_prefill_wide_kernel": 1,
        "_widen_kernel": 1,
    }


def test_rows_of_any_number_and_place_share_kernels(compiler: Compiler):
    """Whatever number of parts keys are cut into, and wherever in a vector rows begin."""
    from millrace.kernels.gpu import attention as gpu
    from millrace.kernels.gpu import gdn as gpu_gdn
    from millrace.kernels.gpu import quantize

    pages = empty(50, 64, LARGE.kv_heads, LARGE.head_dim, dtype=FP8)
    cache, table = KVCache(pages, pages), empty(9, 16, dtype=torch.int32)
    state, slots = gdn_state(LARGE, 2), empty(9, dtype=torch.int32)
    taps, gates = empty(LARGE.channels, 4), empty(PROMPT, LARGE.value_heads, dtype=F32)
    for rows, context in ((1, 300), (2, 5000), (40, 5000), (100, 300)):
        q = empty(2 * rows, LARGE.heads, LARGE.head_dim)
        some = torch.empty(rows + 1, dtype=torch.int64, device="meta")[1:]  # 8 bytes further
        gpu.attend_decode(q, cache, table, DecodeRows(some, some, 2, context), 1 / 16)
    for first in (0, 1):
        some = torch.empty(9, dtype=torch.int64, device="meta")[first : first + 8]
        offsets = torch.empty(10, dtype=torch.int32, device="meta")[first : first + 9]
        rows_of = PrefillRows(some, some, offsets, None, None, 4096)
        qkv = gpu_gdn.conv_prefill(empty(PROMPT, LARGE.channels), state, taps, rows_of, slots)
        gpu_gdn.gdn_prefill(qkv, gates, gates, state, rows_of)
    for tokens in (4, 12, 64):
        quantize.quantize(empty(tokens, LARGE.hidden))
    several = {name: len(forms) for name, forms in compiler.forms.items() if len(forms) > 1}
    assert several == {}


def test_no_kernel_is_left_out(compiler: Compiler):
    """What is launched from the host is named *_kernel; the rest is compiled as part of that."""
    import triton

    import millrace.kernels.gpu as package

    for part in PARTS:
        part(LARGE)
    kernels = {
        name
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        for name, member in vars(importlib.import_module(module.name)).items()
        if isinstance(member, triton.JITFunction) and name.endswith("_kernel")
    }
    assert kernels == set(compiler.shared)


class Nvrtc:
    """NVIDIA's run-time compiler, from its wheel."""

    def __init__(self, folder: Path) -> None:
        builtins, library = folder.glob("libnvrtc-builtins.so.*"), folder.glob("libnvrtc.so.*")
        for path in builtins:  # found by name, once it is loaded
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.call = ctypes.CDLL(str(next(library)))

    def compile(self, text: str, architecture: str = "90") -> str:
        """What the compiler says about registers and memory; raises ValueError with its errors. The
        machine code is kept."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        options = [f"--gpu-architecture=sm_{architecture}".encode(), b"--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(options))(*options)
        encoded = text.encode()
        assert not self.call.nvrtcCreateProgram(
            ctypes.byref(program), encoded, b"kernel.cu", 0, None, None
        )
        failed = self.call.nvrtcCompileProgram(program, len(options), array)
        self.call.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.call.nvrtcGetProgramLog(program, log)
        if not failed:
            self.call.nvrtcGetCUBINSize(program, ctypes.byref(size))
            code = ctypes.create_string_buffer(size.value)
            self.call.nvrtcGetCUBIN(program, code)
            self.cubin = code.raw
        self.call.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            raise ValueError(log.value.decode())
        return log.value.decode()


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    spec = importlib.util.find_spec("nvidia")
    folders = [
        Path(place) / "cu13" / "lib" for place in (spec and spec.submodule_search_locations) or ()
    ]
    found = [folder for folder in folders if any(folder.glob("libnvrtc.so.*"))]
    if not found:
        pytest.skip("needs the package nvidia-cuda-nvrtc")
    return Nvrtc(found[0])


def spilled(log: str) -> int:
    """Bytes of registers that did not fit, and went to memory."""
    return sum(
        int(line.split(" bytes spill stores")[0].split()[-1])
        for line in log.splitlines()
        if "spill stores" in line
    )


def test_a_fault_in_cuda_is_found(nvrtc: Nvrtc):
    with pytest.raises(ValueError, match="undefined"):
        nvrtc.compile('extern "C" __global__ void kernel(int* x) { *x = y; }')


def test_attention_of_hopper(nvrtc: Nvrtc):
    """Products are not serialized (C7510 and its like), and no operand in flight is written."""
    from millrace.kernels.gpu.attention import hopper

    log = nvrtc.compile(hopper.source(torch.int64, torch.int32), "90a")
    assert spilled(log) == 0
    assert "(C75" not in log, log
    lines = disassembled(nvrtc.cubin)
    assert sum("HGMMA" in line for line in lines) == hopper.DIM // 16 + 2 * hopper.BLOCK // 16
    assert any("USETMAXREG" in line for line in lines)
    assert overwritten_operands(lines) == []
    assert hopper.SHARED_BYTES <= SHARED_MEMORY


def test_gemm_few(nvrtc: Nvrtc):
    from millrace.kernels.gpu.gemm import few

    assert spilled(nvrtc.compile(few.source())) == 0


@pytest.mark.parametrize("groups", [4, 6, 16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("pairs", [8, 500])
def test_experts_few(nvrtc: Nvrtc, groups: int, gated: bool, pairs: int):
    from millrace.kernels.gpu.moe import few

    form = few.form_of(groups, gated, pairs, pairs > 100)
    assert spilled(nvrtc.compile(few.source(form))) == 0


@pytest.mark.parametrize("alone", [True, False])
def test_groups_of_experts(nvrtc: Nvrtc, alone: bool):
    from millrace.kernels.gpu.moe import routing

    assert spilled(nvrtc.compile(routing.source(16, 2048, alone))) == 0


def test_w4_codes_are_loaded_as_neighbours(compiler: Compiler):
    """Where the compiler does not see it, each byte is loaded by itself: ten times slower."""
    w4_products(LARGE)
    assert all("cp.async.cg" in ptx for ptx in compiler.code["_matmul_kernel"])
    assert all("ld.shared.b8" not in ptx for ptx in compiler.code["_matmul_kernel"])
    assert all("ld.global.v4" in ptx for ptx in compiler.code["_dequantize_kernel"])


@pytest.mark.parametrize("zeros", [False, True])
def test_w4_few(nvrtc: Nvrtc, zeros: bool):
    from millrace.kernels.gpu.gemm import w4_few

    for outputs, width in ((5120, 6144), (5120, 17408), (16384, 5120), (34816, 5120)):
        form = w4_few.form_for(outputs, width, zeros)
        allowed = 24 if form == w4_few.SMALL_WIDE else 0  # faster so, measured on an H200
        assert spilled(nvrtc.compile(w4_few.source(form, zeros))) <= allowed


def registers(log: str) -> int:
    """Of a thread, in the kernel that takes most of them."""
    return max(
        int(line.split("Used ")[1].split()[0]) for line in log.splitlines() if "Used" in line
    )


@pytest.mark.parametrize("convolve", [True, False], ids=["convolve", "convolved"])
@pytest.mark.parametrize("state", [BF16, torch.float16, F32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("width", [1, 2, 6])
def test_gdn_decode(nvrtc: Nvrtc, width: int, state: torch.dtype, convolve: bool):
    """At the 27B model's shapes, with room for as many blocks as hide what they wait for."""
    from millrace.kernels.gpu.gdn.decode import Shape as GDNShape
    from millrace.kernels.gpu.gdn.decode import source

    low, half = state == BF16, state == torch.float16
    shape = GDNShape(width, 16, 128, 128, 3, True, convolve, True, low, True, True, half)
    log = nvrtc.compile(source(shape, "gdn_prepare"))
    assert spilled(log) == 0
    assert registers(log) <= 64
    for ahead in () if convolve else (True, False):
        log = nvrtc.compile(source(replace(shape, AHEAD=ahead), "gdn_answer"))
        assert spilled(log) <= 72  # with one token a row; none with more
        assert registers(log) <= 168


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_gdn_decode_of_other_models(nvrtc: Nvrtc, dim: int, ratio: int):
    """Few heads a key, and float32 throughout."""
    from millrace.kernels.gpu.gdn.decode import Shape as GDNShape
    from millrace.kernels.gpu.gdn.decode import source

    shape = GDNShape(3, 16, dim, dim, ratio, False, True, False, False, False, False)
    for kernel, most in (("gdn_prepare", 0), ("gdn_answer", 72)):
        assert spilled(nvrtc.compile(source(shape, kernel))) <= most
