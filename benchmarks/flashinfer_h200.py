"""FlashInfer's attention and GDN prefill compared with ours, on one GPU, at shapes of Qwen3.5-27B.

    python benchmarks/flashinfer_h200.py [--only attention,gdn] [--out FILE]

Needs flashinfer-python and a compiler: it builds what it runs, which takes minutes. Both get the
same inputs; `apart` is the relative difference of their results. Times are medians of consecutive
calls, with the work that each needs around its kernel (see the notes in the output).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import commit

from millrace.kernels.batch import DecodeRows, GDNState, KVCache, PrefillRows
from millrace.kernels.gpu.attention.decode import attend_decode
from millrace.kernels.gpu.attention.prefill import attend_prefill
from millrace.kernels.gpu.gdn.prefill import gdn_prefill

HEADS, KV_HEADS, DIM, PAGE = 24, 4, 256, 64
KEY_HEADS, VALUE_HEADS, STATE_DIM = 16, 48, 128
DEVICE = "cuda"
# Query tile, block of keys, warps, stages.
CONFIGS = [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (128, 64, 8, 1), (128, 128, 8, 1)]
# Block of keys, parts of a row, warps, stages.
DECODE_CONFIGS = [
    *((64, 1, 4, stages) for stages in (3, 5, 7)),
    *((32, 1, 4, stages) for stages in (3, 5, 7)),
    *((64, 2, 4, stages) for stages in (3, 5)),
    (128, 1, 8, 3), (64, 1, 2, 3), (32, 1, 2, 5),
]  # fmt: skip


def microseconds(run: Callable[[], object]) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 4)
    return round(statistics.median(times), 1)


def microseconds_or_why(run: Callable[[], object]) -> float | str:
    try:
        return microseconds(run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]


def apart(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    return float((a - b).norm() / b.norm())


def compared(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "ours_us": microseconds(ours)}
    try:
        began = time.perf_counter()
        found["apart"] = apart(theirs(), ours())
        found["built_s"] = round(time.perf_counter() - began, 1)
        found["flashinfer_us"] = microseconds(theirs)
    except Exception as error:
        found["flashinfer"] = f"{type(error).__name__}: {error}"[:400]
    return found


# --- attention ---------------------------------------------------------------------------------


def pages(rows: int, length: int, dtype: torch.dtype) -> tuple[KVCache, Tensor]:
    """Keys and values of `rows` rows in pages of any order, and the table [rows + 1, pages]."""
    count = -(-length // PAGE)
    shape = (rows * count + 1, PAGE, KV_HEADS, DIM)
    cache = KVCache(*(torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)))
    table = torch.randperm(rows * count, device=DEVICE).view(rows, count) + 1
    return cache, torch.cat([torch.zeros_like(table[:1]), table]).int()


class Attention:
    """Rows of `length` tokens, of which the last `queries` ask: prompts where that is all."""

    def __init__(self, rows: int, queries: int, length: int, dtype: torch.dtype) -> None:
        self.name = f"attention {rows} x {length}, {queries} queries, {dtype}"
        self.shape, self.dtype = (rows, queries, length), dtype
        self.cache, self.table = pages(rows, length, dtype)
        self.q = torch.randn(rows * queries, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        self.slots = torch.arange(1, rows + 1, device=DEVICE)
        self.starts = torch.full_like(self.slots, length - queries)
        self.offsets = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * queries
        self._wrapper: Any = None

    @property
    def decodes(self) -> bool:
        return self.shape[1] <= 8

    def ours(self, config: Any = None, special: bool | None = None) -> Tensor:
        """special: values in pairs of channels for decode rows, widened keys for prompts."""
        (rows, queries, length), given = self.shape, (self.q, self.cache, self.table)
        if self.decodes:
            some = DecodeRows(self.slots, self.starts, queries, length)
            return attend_decode(*given, some, DIM**-0.5, config=config, pairs=special)
        counts, begins = (queries,) * rows, (length - queries,) * rows
        many = PrefillRows(self.slots, self.starts, self.offsets, counts, begins)
        return attend_prefill(*given, many, DIM**-0.5, config=config, widen=special)

    def theirs(self) -> Tensor:
        self._wrapper = self._wrapper or self._planned()
        out: Tensor = self._wrapper.run(self.q, (self.cache.keys, self.cache.values))
        return out

    def _planned(self) -> Any:
        import flashinfer

        space = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        rows, _, length = self.shape
        each = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE)
        wrapper.plan(
            self.offsets, each * self.table.shape[1], self.table[1:].flatten().contiguous(),
            torch.full_like(each[1:], (length - 1) % PAGE + 1), HEADS, KV_HEADS, DIM, PAGE,
            causal=True, q_data_type=torch.bfloat16, kv_data_type=self.dtype,
        )  # fmt: skip
        return wrapper

    def by_config(self) -> dict[str, float | str]:
        forms = (True, False) if self.dtype == torch.float8_e4m3fn else (False,)
        return {
            f"{config} {'special' if special else 'plain'}": microseconds_or_why(
                functools.partial(self.ours, config, special)
            )
            for special in forms
            for config in (DECODE_CONFIGS if self.decodes else CONFIGS)
        }


def attention(rows: int, queries: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    case = Attention(rows, queries, length, dtype)
    found = compared(case.name, case.ours, case.theirs)
    return {**found, "ours_by_config_us": case.by_config()}


# --- GDN ---------------------------------------------------------------------------------------


def gdn(rows: int, length: int) -> dict[str, Any]:
    """Prompts from zero states. FlashInfer takes normed queries and keys, contiguous and apart, and
    decays as factors; making these of our tensors is not in its time."""
    from flashinfer import chunk_gated_delta_rule

    tokens, width = rows * length, STATE_DIM
    qkv = torch.randn(tokens, (2 * KEY_HEADS + VALUE_HEADS) * width, device=DEVICE).bfloat16()
    g = -torch.rand(tokens, VALUE_HEADS, device=DEVICE) * 0.2
    beta = torch.rand(tokens, VALUE_HEADS, device=DEVICE)

    def state() -> Tensor:
        return torch.zeros(rows + 1, VALUE_HEADS, width, width, device=DEVICE)

    cache = GDNState(
        state(), *(torch.zeros(rows + 1, KEY_HEADS, 16, width, device=DEVICE) for _ in range(4))
    )
    slots = torch.arange(1, rows + 1, device=DEVICE)
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * length
    prompts = PrefillRows(slots, torch.zeros_like(slots), offsets, (length,) * rows, (0,) * rows)
    q, k, v = qkv.split([KEY_HEADS * width, KEY_HEADS * width, VALUE_HEADS * width], dim=1)
    q, k = (
        torch.nn.functional.normalize(x.view(tokens, KEY_HEADS, width).float(), dim=-1).bfloat16()
        for x in (q, k)
    )
    v = v.reshape(tokens, VALUE_HEADS, width).contiguous()
    alpha, last = g.exp(), torch.empty_like(cache.state[1:])

    def ours() -> Tensor:
        cache.state.zero_()
        return gdn_prefill(qkv, g, beta, cache, prompts)

    def theirs() -> Tensor:
        out, _ = chunk_gated_delta_rule(
            q, k, v, alpha, beta, None, torch.zeros_like(last), True, offsets, output_state=last
        )
        return out  # type: ignore[no-any-return]

    return compared(f"GDN prefill {rows} x {length}", ours, theirs)


def cases(only: list[str]) -> Iterator[Callable[[], dict[str, Any]]]:
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    if "attention" in only:
        for shape in (
            (256, 2, 960),
            (32, 2, 960),
            (8, 1024, 1024),
            (1, 16384, 16384),
            (1, 16384, 32768),
        ):
            for dtype in (fp8, bf16):
                yield lambda shape=shape, dtype=dtype: attention(*shape, dtype)  # type: ignore[misc]
    if "gdn" in only:
        for shape in ((1, 1024), (8, 1024), (1, 16384)):
            yield lambda shape=shape: gdn(*shape)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="attention,gdn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "commit": commit(),
        "cases": [],
    }
    for case in cases(options.only.split(",")):
        found["cases"].append(case())
        print(json.dumps(found["cases"][-1]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
