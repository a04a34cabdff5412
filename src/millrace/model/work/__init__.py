"""What a step of a model must compute and move, from the model's own description.

Accounting, benchmarks and the planner use these functions and no others. They need no torch.
"""

from millrace.model.work.account import Accounted, WorkAccount
from millrace.model.work.drafters import DraftModelWork, Eagle3Work
from millrace.model.work.layout import Formats, Layout, formats_of
from millrace.model.work.parts import Part, Work, step_work
from millrace.model.work.shape import StepShape
from millrace.model.work.weights import (
    WeightCounts,
    experts_hit,
    weight_bytes,
    weight_counts,
)

__all__ = [
    "Accounted",
    "DraftModelWork",
    "Eagle3Work",
    "Formats",
    "Layout",
    "Part",
    "StepShape",
    "WeightCounts",
    "Work",
    "WorkAccount",
    "experts_hit",
    "formats_of",
    "step_work",
    "weight_bytes",
    "weight_counts",
]
