"""Checkpoints with values that no model should have."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from millrace.model.tiny import UNIT_TEST, write_checkpoint


def untied_model(folder: Path) -> Path:
    """A small model whose embedding and output head are two tensors."""
    return write_checkpoint(folder / "model", dataclasses.replace(UNIT_TEST, tied=False), seed=1)


def damaged(model: Path, folder: Path, tensor: str, row: int | None, value: float) -> Path:
    """A copy of a checkpoint with a row of the tensors of that name, or all of it, set to a
    value."""
    copy = folder / "damaged"
    shutil.copytree(model, copy)
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(tensor)]:
            tensors[name][slice(None) if row is None else row] = value
        save_file(tensors, file)
    return copy
