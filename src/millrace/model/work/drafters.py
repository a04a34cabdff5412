"""The work of drafters with weights of their own: a smaller model, or an EAGLE3 head.

As such a drafter runs in a step: over all tokens of the step first, to keep their keys and values,
then once for each draft of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from millrace.model.config import ModelConfig
from millrace.model.work.layout import COMPUTE, WEIGHT_BYTES, Formats
from millrace.model.work.parts import Part, step_work
from millrace.model.work.shape import StepShape


@dataclass(frozen=True, slots=True)
class DraftModelWork:
    """A whole model that drafts, on every rank."""

    config: ModelConfig
    formats: Formats

    def part(self, shape: StepShape, drafts: int) -> Part:
        """Of steps whose rows get so many drafts. Its head runs for drafts alone."""
        silent = StepShape(
            shape.decode_rows, shape.decode_tokens, shape.decode_context, shape.prompts,
            shape.prompt_tokens, shape.prompt_context, shape.prompt_attention,
        )  # fmt: skip
        rows = shape.sampled_rows
        context = shape.decode_context + (shape.prompt_context + shape.prompt_tokens) * (
            (rows - shape.decode_rows) / _at_least_one(shape.prompts)
        )
        one = StepShape(rows, rows, context, sampled_rows=rows)
        flops: Any = 0.0
        read: Any = 0.0
        written: Any = 0.0
        for work, times in (
            (step_work(self.config, silent, self.formats).parts, 1),
            (step_work(self.config, one, self.formats).parts, drafts),
        ):
            for name, part in work.items():
                if times == 1 and name == "heads":
                    continue  # keys and values of a step's tokens need no logits
                flops += times * part.flops
                read += times * part.read
                written += times * part.written
        return Part(flops, self.formats.compute, read, written)


@dataclass(frozen=True, slots=True)
class Eagle3Work:
    """An EAGLE3 layer. target_hidden: channels of the model that it reads. vocab_size: its own."""

    config: ModelConfig
    formats: Formats
    target_hidden: int
    vocab_size: int

    def part(self, shape: StepShape, drafts: int) -> Part:
        """Of steps whose rows get so many drafts: all tokens are fused, and have keys and values;
        the rest of the layer and the head run for drafts alone."""
        c, h = self.config, self.config.hidden_size
        fusion = 3.0 * self.target_hidden * h
        keys = 2.0 * h * 2 * c.num_kv_heads * c.head_dim
        mixer = 2.0 * h * c.num_heads * c.head_dim + keys + c.num_heads * c.head_dim * h
        layer = mixer + 3.0 * h * c.intermediate_size
        head = float(h * self.vocab_size)
        rows, tokens = shape.sampled_rows, shape.tokens
        passes = drafts * (rows > 0)
        each = WEIGHT_BYTES[self.formats.plain]
        flops = 2.0 * tokens * (fusion + keys) + 2.0 * drafts * rows * (layer + head)
        flops += 4.0 * c.num_heads * c.head_dim * shape.decode_context * drafts
        read = ((layer + head) * passes + (fusion + keys) * (tokens > 0)) * each
        return Part(flops, COMPUTE[self.formats.plain], read, 4.0 * self.vocab_size * rows * drafts)


def _at_least_one(count: Any) -> Any:
    return count * (count > 1) + (count <= 1)
