"""`python -m millrace.runtime.kernel_tuning`: what `millrace tune kernels` starts, on one GPU."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from millrace.common.child_process import end_with_parent
from millrace.errors import ConfigError, UserError, one_line

CACHED = {"bfloat16": 2, "fp8_e4m3": 1}  # bytes of a cached key's number


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    end_with_parent(options.parent)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if not torch.cuda.is_available():
            raise ConfigError("there is no GPU here; run it on the machine that will serve")
        from millrace.runtime.kernel_tuning.run import run  # needs packages for GPUs

        run(options)
    except UserError as error:
        print(f"millrace tune kernels: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kernel_tuning")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--drafts", type=int, required=True)
    parser.add_argument("--cached", type=lambda name: CACHED[name], required=True)
    parser.add_argument("--page", type=int, required=True)
    parser.add_argument("--by", required=True)
    parser.add_argument("--tokens", type=_numbers, default=())
    parser.add_argument("--sections", type=lambda text: text.split(","), default=[])
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, text.split(","))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
