"""Goes on with millrace-mini's training, on questions with retrieved clauses.

    python -m examples.insurance.training.train --directory models/millrace-mini \
        --resume models/millrace-mini --out OUT

The recipe is `models/mini/train.py`'s, flags and files included; only the text is another. Minutes
on one GPU. On a CPU a narrower run fits into an hour:

    ... --no-compile --workers 0 --steps 400 --mtp-steps 0 --mtp-weight 0 --batch 8 --length 512
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

RECIPE = Path(__file__).parents[3] / "models" / "mini"
sys.path.insert(0, str(RECIPE))

import data  # noqa: E402 (on the path from here on)
import train as recipe  # noqa: E402

from examples.insurance.training.dialogues import pieces  # noqa: E402

QUESTIONS = (1, 3, 4, 5)  # of a dialogue: many questions make use of one prompt
OTHER_SHARE = 0.06  # of the tasks that the model knows already, so that it keeps them


class Dialogues(IterableDataset[Tensor]):
    """Batches [3, B, L] (ids, documents, kinds); each worker draws its own."""

    def __init__(self, directory: Path, batch: int, length: int, seed: int) -> None:
        self.directory, self.batch, self.length, self.seed = directory, batch, length, seed

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        rng = random.Random(f"insurance/train/{self.seed}/{info.id if info else 0}")
        render = data.template()

        def draw() -> list[tuple[str, bool]]:
            if rng.random() < OTHER_SHARE:
                made: list[tuple[str, bool]] = data.draw_pieces(render, rng, math_share=0.0)
                return made
            return pieces(rng, rng.choice(QUESTIONS))

        tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        rows = data.packed(tokenizer, self.length, draw)
        while True:
            batch = [next(rows) for _ in range(self.batch)]
            yield torch.stack(
                [
                    torch.stack([torch.from_numpy(getattr(row, name)) for row in batch])
                    for name in ("ids", "documents", "kinds")
                ]
            )


def batches(
    directory: Path, settings: recipe.Settings, seed: int, workers: int
) -> Iterator[Tensor]:
    loader = DataLoader(
        Dialogues(directory, settings.batch, settings.length, seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def main() -> None:
    args, settings = recipe.parse(str(__doc__).splitlines()[0])
    assert isinstance(args, argparse.Namespace)
    recipe.train(args, settings, batches)


if __name__ == "__main__":
    main()
