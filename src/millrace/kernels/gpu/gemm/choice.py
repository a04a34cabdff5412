"""Which library multiplies FP8 fastest, by the weight's shape and the number of tokens.

How well a library's tiles fill the multiprocessors goes up and down with the number of tokens, and
DeepGEMM picks other tiles when told to use fewer multiprocessors, or is told which to take. So the
choice is a table for each device and shape (tables.py), as `millrace tune kernels` measures it, and
a rule for shapes that were not measured. Knows names and numbers only, and multiplies nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from millrace.errors import ConfigError
from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu import tables


class GemmBackend(NamedTuple):
    """A library, "deep_gemm" or "cublas", and how many multiprocessors DeepGEMM may use; 0: all.
    tiling: as `clusters.Tiling` reads it, of a kernel that DeepGEMM would not pick; "": it picks.
    """

    library: str
    multiprocessors: int = 0
    tiling: str = ""

    @classmethod
    def parse(cls, text: str) -> GemmBackend:
        """From "cublas", "deep_gemm", "deep_gemm:124" or "deep_gemm@128x160/weight"."""
        text, _, tiling = text.partition("@")
        library, _, count = text.partition(":")
        if library not in ("deep_gemm", "cublas"):
            raise ValueError(f"no library {library!r}; there are deep_gemm and cublas")
        return cls(library, int(count or 0), tiling)

    def __str__(self) -> str:
        count = f":{self.multiprocessors}" if self.multiprocessors else ""
        return self.library + count + (f"@{self.tiling}" if self.tiling else "")


SECTION = "fp8_products"
DEEP_GEMM, CUBLAS = GemmBackend("deep_gemm"), GemmBackend("cublas")


def choose(tokens: int, outputs: int, width: int, device: str) -> GemmBackend:
    """The way to multiply `tokens` rows by a weight [outputs, width] where both libraries are.

    device: its name, as `torch.cuda.get_device_name` tells it.
    """
    found = _measured(tokens, outputs, width, device)
    return rule(tokens, outputs) if found is None else found


def rule(tokens: int, outputs: int) -> GemmBackend:
    """What held for the shapes of Qwen3.5-27B on one H200, before each was measured."""
    if 128 < tokens <= 384:
        return CUBLAS if 12288 <= outputs < 32768 else DEEP_GEMM
    return CUBLAS if 384 < tokens <= 640 and outputs >= 32768 else DEEP_GEMM


@remembered
def _measured(tokens: int, outputs: int, width: int, device: str) -> GemmBackend | None:
    way = tables.find(SECTION, (outputs, width), tokens, device)
    if way is None:
        return None
    try:
        return GemmBackend.parse(str(way))
    except ValueError as error:
        raise ConfigError(f"{tables.own_path(device)}, {SECTION}: {error}") from None
