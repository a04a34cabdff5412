"""The step model of an engine on a GPU, from the parameters that ship or from those of a file."""

from __future__ import annotations

from typing import Any

from millrace.plan.facts.gpus import gpu as find_gpu
from millrace.plan.model.rates import PARAMETERS
from millrace.plan.model.step_model import Description, StepModel


def step_model(gpu: str, model: str, engine: str = "millrace", **options: Any) -> StepModel:
    """The model of one replica. options: the other fields of Description.

    Raises ConfigError for a GPU or a model that is not known.
    """
    description = Description(gpu=find_gpu(gpu).name, model=model, engine=engine, **options)
    rates = {name: p.mean for name, p in PARAMETERS.items()}
    return StepModel(description, rates, sources=dict.fromkeys(rates, "prior"))
