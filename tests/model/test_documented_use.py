"""The lines of docs/model.md that show how a model is used, with the tensors that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from millrace.kernels.batch import Batch, DecodeRows
from millrace.model.build import build_model
from millrace.model.config import read_config
from millrace.model.weights import load
from tests.support.driver import Driver, allocate_caches, make_batch

ROOT = Path(__file__).resolve().parents[2]


@torch.inference_mode()
def test_the_documented_lines_run() -> None:
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    ((code),) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    loading, using = code[: code.index("hidden =")], code[code.index("hidden =") :]
    names: dict[str, Any] = {
        "read_config": read_config, "build_model": build_model, "load": load, "torch": torch,
        "directory": ROOT / "models" / "millrace-mini",
    }  # fmt: skip
    exec(loading, names)
    model, length = names["model"], 6
    driver = Driver(model, allocate_caches(model, slots=1, pages_per_slot=4))
    driver.admit(1)
    tokens = list(range(40, 40 + length))
    names["caches"] = caches = driver.caches
    names["ids"], names["batch"] = make_batch(caches, driver.lengths, [], [(1, tokens)])
    names["next_ids"] = torch.tensor([*tokens[1:], 7])
    _, names["ahead"] = make_batch(caches, driver.lengths + 1, [], [(1, tokens)])
    names["rows"] = names["last"] = torch.tensor([length - 1])
    names["selected"] = _row(caches.kv_rows, length)
    names["drafts"] = torch.tensor([9])
    exec(using, names)
    config = read_config(ROOT / "models" / "millrace-mini")
    assert names["hidden"].shape == names["x"].shape == (length, config.hidden_size)
    assert names["logits"].shape == names["draft_logits"].shape == (1, config.vocab_size)
    assert names["drafted"].shape == names["further"].shape == (1, config.hidden_size)
    assert not any(names[name].isnan().any() for name in ("hidden", "logits", "draft_logits"))


def _row(kv_rows: Any, position: int) -> Batch:
    """One token of slot 1 at `position`, as a decode row of its own."""
    slot, at = torch.tensor([1]), torch.tensor([position])
    return Batch(slot, at, kv_rows(slot, at), DecodeRows(slot, at, 1, position + 1), None)
