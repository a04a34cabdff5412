"""GDN decode in CUDA, run on a CPU: g++ compiles the same sources, their warps emulated.

Proves index arithmetic, not speed: see cuda_on_cpu.h. On a GPU test_gdn.py runs the kernels.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.kernels import gdn
from millrace.kernels.batch import DecodeRows, GDNState
from tests.kernels.gpu.gdn.test_gdn import fill_windows, make_cache
from tests.kernels.gpu.gpu_support import HAS_TRITON, INTERPRETED, relative

if INTERPRETED or not HAS_TRITON:
    pytest.skip("the launchers' module needs Triton", allow_module_level=True)

from millrace.kernels.gpu.gdn import decode as gpu

HERE = Path(__file__).parents[1]  # where cuda_on_cpu.h is
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ENTRY = """
namespace {space} {{
{source}
}}
extern "C" void run_{space}(void** arguments, int columns, int rows, int threads) {{
  call({space}::{kernel}, arguments, columns, rows, threads);
}}
"""


@dataclass(frozen=True)
class Form:
    """A shape to test, with the dtypes of model, state and gates."""

    width: int
    window: int
    dims: tuple[int, int]
    ratio: int
    model: torch.dtype = F32
    state: torch.dtype = F32
    gates: torch.dtype = F32

    @property
    def shape(self) -> gpu.Shape:
        low = [kind == BF16 for kind in (self.model, self.state, self.keys, self.gates)]
        half = self.state == FP16
        return gpu.Shape(self.width, self.window, *self.dims, self.ratio, True, True, *low, half)

    @property
    def keys(self) -> torch.dtype:
        """Of the window."""
        return BF16 if self.state == FP16 else self.state


FORMS = [
    Form(2, 18, (32, 32), 3),
    Form(1, 16, (128, 64), 1, BF16, F32, BF16),
    Form(3, 16, (64, 128), 2, BF16, BF16, BF16),
    Form(6, 16, (64, 64), 4, BF16, F32, F32),
    Form(5, 16, (32, 64), 5, F32, BF16, F32),
    Form(2, 16, (64, 64), 3, BF16, FP16, BF16),
]
IDS = [f"{form.width}-{form.ratio}-{str(form.state)[6:]}" for form in FORMS]
each_form = pytest.mark.parametrize("form", FORMS, ids=IDS)


class Emulated:
    """A kernel as the launcher calls it; `args` are those of the last call."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.args: list[Any] = []

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: list[Any]
    ) -> None:
        self.args = args
        values = [
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int(x)
            for x in args
        ]
        pointers = [ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values]
        self.run((ctypes.c_void_p * len(args))(*pointers), *grid[:2], block[0])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a form: gdn_prepare with and without the convolution, and gdn_answer."""
    folder = tmp_path_factory.mktemp("gdn")

    @functools.cache
    def build(form: Form) -> dict[str, Emulated]:
        stem = folder / f"gdn{FORMS.index(form)}"
        plain = replace(form.shape, CONV=False)
        parts = {
            "fused": (form.shape, "gdn_prepare"),
            "plain": (plain, "gdn_prepare"),
            "answer": (plain, "gdn_answer"),
        }
        text = '#include "cuda_on_cpu.h"\n'
        for space, (shape, kernel) in parts.items():
            source = gpu.source(shape, kernel).replace('extern "C"', "")
            text += ENTRY.format(space=space, source=source, kernel=kernel)
        stem.with_suffix(".cpp").write_text(text)
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", "-o"]
        subprocess.run([*command, f"{stem}.so", f"{stem}.cpp"], check=True, timeout=120)
        library = ctypes.CDLL(f"{stem}.so")
        return {space: Emulated(getattr(library, f"run_{space}")) for space in parts}

    return build


@dataclass
class Step:
    """A decode step of five rows in nine slots: an empty window, full ones, some that fold."""

    form: Form
    cache: GDNState
    fill: Tensor
    offset: Tensor
    rows: DecodeRows
    x: Tensor
    weight: Tensor
    gates: tuple[Tensor, ...]

    @classmethod
    def random(cls, form: Form, order: tuple[int, ...] = (6, 1, 8, 3, 4)) -> Step:
        torch.manual_seed(form.width)
        width, window, heads = form.width, form.window, (2, 2 * form.ratio)
        cache = make_cache(9, heads, form.dims, window, width, "cpu")
        slots = torch.tensor(order)
        fill = torch.randint(0, window + 1, (9,), dtype=torch.int32)
        fill[[6, 1, 8, 3]] = torch.tensor([0, window, window - width, window - width + 1]).int()
        fill_windows(cache, fill)
        cache.state, cache.window_k = cache.state.to(form.state), cache.window_k.to(form.keys)
        cache.conv = cache.conv.to(form.model)
        tokens, channels = width * len(order), cache.conv.shape[2]
        x = torch.randn(tokens, channels + 24).to(form.model)[:, :channels]
        a, b = torch.randn(tokens, 2 * heads[1]).to(form.gates).split(heads[1], -1)
        a_log, bias = torch.rand(2, heads[1])
        return cls(
            form, cache, fill, torch.randint(0, width, (9,), dtype=torch.int32),
            DecodeRows(slots, torch.zeros_like(slots), width, 1), x,
            torch.randn(channels, 4).to(form.model), (a, b, a_log, bias),
        )  # fmt: skip

    def run(self, kernels: dict[str, Emulated]) -> Tensor:
        return self._launch("fused", kernels, self.x, (self.weight, self.offset))

    def run_convolved(self, kernels: dict[str, Emulated], qkv: Tensor) -> Tensor:
        return self._launch("plain", kernels, qkv, None)

    def _launch(
        self, first: str, kernels: dict[str, Emulated], qkv: Tensor, conv: gpu.Pair | None
    ) -> Tensor:
        form = gpu.Native(kernels[first], kernels["answer"], self.form.shape.threads)
        heads, dim = self.cache.state.shape[1::2]
        out = torch.empty(len(qkv), heads, dim, dtype=qkv.dtype)
        gpu.launch_native(form, qkv, self.gates, self.cache, self.fill, self.rows, conv, out)
        return out


def live(step: Step, cache: GDNState) -> dict[str, Tensor]:
    """What of the caches means anything once the step is over, stale rows of windows as zeros."""
    width, window = step.form.width, step.form.window
    found = {"state": cache.state.float(), "conv": cache.conv[:, : width + 2].float()}
    for name in ("window_k", "window_u", "window_g"):
        found[name] = getattr(cache, name).float().clone()
        for slot in step.rows.slots.tolist():
            fill = int(step.fill[slot])
            end = fill + width if fill + width <= window else width
            found[name][slot, :, end:] = 0
    return found


@each_form
def test_step(built: Any, form: Form):
    """Convolution, windows, folds and outputs of the fused form are the reference's."""
    step = Step.random(form)
    expected = copy.deepcopy(step.cache)
    want = gdn.gdn_decode_conv.__wrapped__(
        step.x, step.weight, *step.gates, expected, step.fill, step.offset, step.rows
    )
    got = step.run(built(form))
    limit = 8e-3 if BF16 in (form.model, form.state, form.keys) else 2e-5
    assert relative(got, want) < limit
    assert torch.equal(step.cache.conv, expected.conv)
    for (name, mine), theirs in zip(
        live(step, step.cache).items(), live(step, expected).values(), strict=True
    ):
        assert relative(mine, theirs) < limit, name


@each_form
def test_fusing_changes_no_bit(built: Any, form: Form):
    kernels, step = built(form), Step.random(form)
    twin = Step.random(form)
    got = step.run(kernels)
    convolved = kernels["fused"].args[4]
    assert torch.equal(twin.run_convolved(kernels, convolved), got)
    for name in ("state", "window_k", "window_u", "window_g"):
        mine, theirs = getattr(step.cache, name), getattr(twin.cache, name)
        assert torch.equal(mine.nan_to_num(9.0), theirs.nan_to_num(9.0)), name
    want = gdn.conv_decode.__wrapped__(twin.x, twin.cache, twin.weight, twin.rows, twin.offset)
    assert relative(convolved, want) < (4e-3 if form.model == BF16 else 1e-6)


def test_null_rows_do_not_reach_live_ones(built: Any):
    """Rows of slot 0, which is full of NaN, beside others; slots of no row stay as they are."""
    form = FORMS[2]
    alone, beside = Step.random(form, (8, 3)), Step.random(form, (0, 8, 0, 3))
    n = form.width
    for step in (alone, beside):
        step.cache.state[0] = torch.nan
        step.cache.conv[0] = torch.nan
    beside.cache = copy.deepcopy(alone.cache)
    beside.fill, beside.offset, beside.weight = alone.fill, alone.offset, alone.weight
    keep = torch.cat([torch.arange(n, 2 * n), torch.arange(3 * n, 4 * n)])
    beside.x[:n], beside.x[2 * n : 3 * n] = torch.nan, torch.nan
    beside.x[keep] = alone.x
    for mine, theirs in zip(beside.gates[:2], alone.gates[:2], strict=True):
        mine[keep] = theirs
    beside.gates = (*beside.gates[:2], *alone.gates[2:])
    before, kernels = copy.deepcopy(alone.cache), built(form)
    want, got = alone.run(kernels), beside.run(kernels)
    assert torch.equal(got[keep], want)
    for name in ("state", "conv", "window_k", "window_u", "window_g"):
        mine, theirs, old = (getattr(x, name) for x in (beside.cache, alone.cache, before))
        assert torch.equal(mine[1:].nan_to_num(9.0), theirs[1:].nan_to_num(9.0)), name
        others = [1, 2, 4, 5, 6, 7]
        assert torch.equal(mine[others].nan_to_num(9.0), old[others].nan_to_num(9.0)), name
