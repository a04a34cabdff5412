"""Adds up the work of an engine's steps, from their sizes alone.

A step costs one tuple in a list; the work model is evaluated for many steps at once. It knows no
device and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from millrace.model.config import ModelConfig
from millrace.model.work.drafters import DraftModelWork, Eagle3Work
from millrace.model.work.layout import Formats, Layout
from millrace.model.work.parts import Part, Work, step_work
from millrace.model.work.shape import StepShape
from millrace.model.work.weights import weight_counts
from millrace.protocol import PartWork, WorkStats

MOST_STEPS = 512  # that wait to be evaluated


@dataclass(frozen=True, slots=True)
class Accounted:
    """What is accounted: a model on one of `layout`'s ranks. head_drafts: drafts of a step and row
    that weights make at most; 0: none, or all are looked up. draft_model: a drafter with weights of
    its own. selects: whether the last layer computes only keys and values of tokens that are not
    scored, in steps with prompts."""

    config: ModelConfig
    formats: Formats
    layout: Layout = Layout()  # noqa: RUF009, frozen
    head_drafts: int = 0
    draft_model: DraftModelWork | Eagle3Work | None = None
    selects: bool = False

    def work(self, shape: StepShape, drafts: int) -> Work:
        """Of steps whose rows have so many drafts. What a head makes no more of is looked up."""
        made = min(drafts, self.head_drafts)
        own = 0 if self.draft_model is not None else made
        parts = step_work(self.config, shape, self.formats, self.layout, own).parts
        if self.selects:
            parts |= {
                name: replace(parts[name], flops=parts[name].flops - flops)
                for name, flops in _spared(self.config, shape, self.layout).items()
            }
        if self.draft_model is not None:
            parts |= {"draft_model": self.draft_model.part(shape, made)}
        return Work(parts)


def _spared(config: ModelConfig, shape: StepShape, layout: Layout) -> dict[str, Any]:
    """FLOPs of the last layer for tokens of prompts that are not scored."""
    counts, tokens = weight_counts(config), shape.tokens - shape.scored_tokens
    inner, h = config.num_heads * config.head_dim, config.hidden_size
    keys = 2.0 * h * config.num_kv_heads * config.head_dim
    linear = counts.attention / config.num_attention_layers - keys
    experts = 0.0
    if counts.moe_layers and config.experts is not None:
        experts = config.experts.top_k * counts.expert
        linear += 3.0 * h * config.experts.shared_width
    else:
        linear += 3.0 * h * config.intermediate_size
    ends = (shape.sampled_rows - shape.decode_rows) / (shape.prompts + (shape.prompts == 0))
    read = shape.prompt_attention - ends * (shape.prompt_context + shape.prompt_tokens)
    return {
        "linear": 2.0 * linear * tokens / layout.tensor,
        "experts": 2.0 * experts * tokens / layout.tensor,
        "attention": 4.0 * inner * read / layout.tensor,
    }


class WorkAccount:
    """Sums of the work of steps, by part."""

    def __init__(self, accounted: Accounted) -> None:
        self._accounted = accounted
        self._waiting: dict[int, list[Sequence[float]]] = {}  # sizes of steps, by drafts
        self._count = 0
        self._seconds = 0.0
        self._parts: dict[str, Part] = {}

    def add(self, counts: Sequence[float], drafts: int, seconds: float) -> None:
        """A step has ended. counts: the fields of StepShape, in order. seconds: that it took."""
        self._seconds += seconds
        self._waiting.setdefault(drafts, []).append(counts)
        self._count += 1
        if self._count >= MOST_STEPS:
            self._evaluate()

    def totals(self) -> WorkStats:
        """Since the first step."""
        self._evaluate()
        return WorkStats(self._seconds, {name: _sums(p) for name, p in self._parts.items()})

    def _evaluate(self) -> None:
        for drafts, rows in self._waiting.items():
            shape = StepShape(*np.asarray(rows, dtype=np.float64).T)
            for name, part in self._accounted.work(shape, drafts).parts.items():
                self._parts[name] = _added(self._parts.get(name), part)
        self._waiting, self._count = {}, 0


def _added(sums: Part | None, part: Part) -> Part:
    """sums: of earlier steps. part: with an entry for each of several steps."""
    before = sums or Part()
    return replace(
        part,
        flops=before.flops + float(np.sum(part.flops)),
        read=before.read + float(np.sum(part.read)),
        written=before.written + float(np.sum(part.written)),
    )


def _sums(part: Part) -> PartWork:
    return PartWork(part.unit, part.flops, part.read, part.written)
