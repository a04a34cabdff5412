"""Makes the int4 twin of a model directory, by GPTQ on items as it was trained on.

    python models/mini/make_int4.py models/millrace-mini models/millrace-mini-int4

As `millrace quantize MODEL --to int4 --calibration TEXT` does, but item by item, each with its chat
template, from the random streams of training: no held-out item is seen.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from data import draw_pieces, template
from tokenizers import Tokenizer

from millrace.quantize.checkpoint import Target, quantize_checkpoint

MATH_SHARE = 0.3
MOST_TOKENS = 1000


def prompts(tokenizer: Tokenizer, tokens: int, seed: int) -> list[list[int]]:
    """Items with their answers, of so many tokens in all."""
    render, rng, found, total = template(), random.Random(seed), [], 0
    while total < tokens:
        text = "".join(piece for piece, _ in draw_pieces(render, rng, MATH_SHARE))
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:MOST_TOKENS]
        found.append(ids)
        total += len(ids)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384, help="to read; 0: round to nearest")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.source / "tokenizer.json"))
    items = prompts(tokenizer, args.tokens, args.seed) if args.tokens else []
    print(quantize_checkpoint(args.source, args.target, Target("int4", args.group_size, items)))


if __name__ == "__main__":
    main()
