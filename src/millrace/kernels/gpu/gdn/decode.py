"""GDN decode and verify in the window form: each state is read once, in the pass that answers.

Two kernels. The first, a program per row and key head, does all that does not touch the state: it
takes the products of the tokens' keys and queries (the probes) with the window's keys and with each
other, turns these with norms and decays into coefficients, and writes the window's new keys and
log A. The convolution before it can be part of it: its channels are divided as the heads are. The
second, for each row, value head and tile of value channels, reads its tile of the state, meets it
with the probes, and adds what window and new tokens give by the coefficients. Both come in two
forms: CUDA (prepare.cu and answer.cu, compiled at run time), which keeps pace with memory,
and Triton (decode_triton.py), before which the convolution is a kernel of its own.

A row whose window would overflow is answered from its window all the same and then folded, in the
second kernel: the tile is there already and goes back once. Its old keys are set aside by the first
kernel, which overwrites them. `millrace.kernels.gdn` has the equations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.batch import DecodeRows, GDNState
from millrace.kernels.dispatch import BackendChoice, remembered
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.gdn import decode_triton as triton_form
from millrace.kernels.gpu.gdn.conv import conv_decode
from millrace.kernels.gpu.quantize import chains_launches

logger = logging.getLogger("millrace.kernels")

Kernel = Callable[..., None]
Pair = tuple[Tensor, Tensor]
ALIGNED = 16  # bytes, of what the CUDA forms read
MOST_THREADS = 1024
MOST_TOKENS = 8  # a row
MOST_ROWS_AHEAD = 128  # with float32 states; with more, spreading the loads is 2% faster


@dataclass(frozen=True)
class Shape:
    """What the CUDA kernels are compiled for; fields in the order of the names they define."""

    N: int
    W: int
    DK: int
    DV: int
    RATIO: int
    RAW: bool
    CONV: bool
    QKV_BF16: bool
    STATE_BF16: bool
    KEY_BF16: bool
    GATE_BF16: bool
    STATE_FP16: bool = False
    AHEAD: bool = True

    @property
    def narrow(self) -> bool:
        """Whether a state's numbers have 16 bits."""
        return self.STATE_BF16 or self.STATE_FP16

    @property
    def blocks(self) -> int:
        """Of the second kernel, on a multiprocessor: they leave a thread registers for its part."""
        return 5 if self.narrow else 3 if self.AHEAD else 4

    @property
    def threads(self) -> int:
        """Of a block of the first kernel: one for four channels."""
        return -(-(2 * self.DK + self.RATIO * self.DV) // 128) * 32


class Native(NamedTuple):
    """The CUDA form: its kernels, and threads of a block of the first."""

    prepare: Kernel
    answer: Kernel
    threads: int
    many: Kernel | None = None  # the second for more than MOST_ROWS_AHEAD, if that is another

    def answer_of(self, rows: int) -> Kernel:
        return self.answer if self.many is None or rows <= MOST_ROWS_AHEAD else self.many


def source(shape: Shape, name: str) -> str:
    """The kernel `name`, gdn_prepare or gdn_answer."""
    constants = asdict(shape) | {"blocks": shape.blocks}
    return cuda_source.read(constants, "gdn/decode.cu", f"gdn/{name.removeprefix('gdn_')}.cu")


def unsupported(shape: Shape) -> str:
    """Why the CUDA form has no kernel for a shape; empty where it has."""
    if shape.DK % 32 or shape.DV % 32:
        return f"heads of {shape.DK} and {shape.DV} channels are no multiples of 32"
    if shape.N > MOST_TOKENS:
        return f"a row has {shape.N} tokens, more than {MOST_TOKENS}"
    if shape.threads > MOST_THREADS:
        return f"a key head and its value heads need {shape.threads} threads, more than a block has"
    return ""


def decode_backend(shape: Shape) -> BackendChoice:
    """Which form runs at a shape; a CUDA one is compiled now."""
    why = unsupported(shape) or ("" if _compiled(shape) else "they cannot be compiled here")
    if why:
        return BackendChoice("GDN decode", "Triton kernels", f"no CUDA kernels: {why}")
    return BackendChoice("GDN decode", "CUDA kernels")


@remembered
def _compiled(shape: Shape) -> Native | None:
    """None where there is no such kernel, or no compiler."""
    if unsupported(shape):
        return None
    answer = _answer(replace(shape, RAW=False, CONV=False))
    prepare = answer and cuda_source.compiled(source(shape, "gdn_prepare"), "gdn_prepare")
    if not (prepare and answer):
        return None
    many = None if shape.narrow else _answer(replace(shape, RAW=False, CONV=False, AHEAD=False))
    return Native(prepare, answer, shape.threads, many)


@remembered
def _answer(shape: Shape) -> Kernel | None:
    return cuda_source.compiled(source(shape, "gdn_answer"), "gdn_answer")


def native(
    qkv: Tensor, g: Tensor, raw: bool, cache: GDNState, width: int, conv_weight: Tensor | None
) -> Native | None:
    """The CUDA form for these tensors, which convolves where a weight is given; None where it does
    not apply."""
    known = {torch.float32: False, torch.bfloat16: True}
    kinds = [x.dtype for x in (qkv, cache.window_k, g)]
    half = cache.state.dtype == torch.float16
    if any(kind not in known for kind in kinds) or not (half or cache.state.dtype in known):
        names = ", ".join(map(str, [*kinds, cache.state.dtype]))
        return _declined(f"they take float32 and bfloat16, and states of float16, not {names}")
    if qkv.stride(0) % 8 or qkv.data_ptr() % ALIGNED:
        return _declined(f"rows of {qkv.stride(0)} channels are not aligned to {ALIGNED} bytes")
    if conv_weight is not None:
        alike = qkv.dtype == cache.conv.dtype == conv_weight.dtype
        if not (alike and conv_weight.is_contiguous() and cache.conv.is_contiguous()):
            return None
    key_heads, window, key_dim = cache.window_k.shape[1:]
    value_heads, _, value_dim = cache.state.shape[1:]
    model, key, gate = (known[kind] for kind in kinds)
    dims = (key_dim, value_dim, value_heads // key_heads)
    convolves, narrow = conv_weight is not None, cache.state.dtype == torch.bfloat16
    low = (model, narrow, key, gate, half)
    return _compiled(Shape(width, window, *dims, raw, convolves, *low))


@remembered
def _declined(reason: str) -> None:
    """Log, once, that a model's tensors keep the CUDA form away."""
    logger.warning("GDN decode: Triton kernels; no CUDA kernels: %s", reason)


def launch(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    raw: Pair | None,
    cache: GDNState,
    fill: Tensor,
    rows: DecodeRows,
    config: tuple[int, int] | None = None,
    conv: Pair | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run the kernels for `gdn_decode`; see there for the arguments. Rows of slot 0 are padding and
    have no tokens. out: where the results go, as many as there are tokens in qkv.

    raw: (A_log, dt_bias) when g and beta are the projections a and b instead, of any row stride.
    config: (value tile, warps) of the second kernel's Triton form; None takes the CUDA forms where
    they apply. conv: (weight, conv_offset) when qkv is the projection, still to be convolved.
    """
    if out is None:
        out = triton_form.outputs(qkv, cache, rows)
    if rows.slots.shape[0] == 0:
        return out
    has_cuda = qkv.is_cuda and config is None

    def found() -> Native | None:
        weight = conv[0] if conv else None
        return native(qkv, g, raw is not None, cache, rows.width, weight) if has_cuda else None

    form = found()
    if form is None and conv is not None:
        qkv, conv = conv_decode(qkv, cache, conv[0], rows, conv[1]), None
        form = found()
    gates = (g, beta, *(raw or (g, g)))
    if form is None:
        triton_form.launch(qkv, gates, raw is not None, cache, fill, rows, config, out)
    else:
        launch_native(form, qkv, gates, cache, fill, rows, conv, out)
    return out


def launch_native(
    form: Native,
    qkv: Tensor,
    gates: tuple[Tensor, ...],
    cache: GDNState,
    fill: Tensor,
    rows: DecodeRows,
    conv: Pair | None,
    out: Tensor,
) -> None:
    """Both kernels in CUDA. conv: the weight and conv_offset, for a form that convolves.

    gates: g, beta, A_log, dt_bias, of which the last two may be anything unless they are used.
    """
    between = triton_form.buffers(cache, rows)
    key_heads, value_heads, value_dim = cache.window_k.shape[1], *cache.state.shape[1::2]
    count, heads = rows.slots.shape[0], (key_heads, value_heads)
    weight, offset = conv or (qkv, fill)
    probes = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if conv else qkv
    form.prepare(
        grid=(key_heads, count, 1), block=(form.threads, 1, 1),
        args=[qkv, weight, cache.conv, offset, probes, *gates, cache.window_k, cache.window_g, fill,
              rows.slots, *between, len(qkv), qkv.stride(0), cache.conv.stride(0),
              gates[0].stride(0), *heads],
    )  # fmt: skip
    form.answer_of(count)(
        grid=(value_heads, count, 1), block=(value_dim, 1, 1),
        args=[probes, cache.state, cache.window_u, fill, rows.slots, *between, out,
              probes.stride(0), *heads], **({"early": True} if chains_launches() else {}),
    )  # fmt: skip
