"""The step model of an engine on a GPU, from the fit that ships or from that of a file."""

from __future__ import annotations

from typing import Any

import numpy as np

from millrace.hardware.gpus import gpu as find_gpu
from millrace.plan.model.posterior import NOISE, Posterior, posterior
from millrace.plan.model.step_model import ApiServer, Description, StartUp, StepModel

# Seconds until an engine answers, measured with 27B FP8 shapes on one H200.
START_UP = {"millrace": StartUp(71.0, 12.0), "vllm": StartUp(443.0, 104.0)}
OTHER_START_UP = StartUp(300.0, 100.0)


def step_model(
    gpu: str, model: str, engine: str = "millrace", known: Posterior | None = None, **options: Any
) -> StepModel:
    """The model of one replica. known: another fit. options: the other fields of Description.

    Raises ConfigError for a GPU or a model that is not known.
    """
    description = Description(gpu=find_gpu(gpu).name, model=model, engine=engine, **options)
    known = known or posterior()
    return with_rates(description, known.rates(engine, description.gpu), known)


def with_rates(d: Description, rates: dict[str, float], known: Posterior) -> StepModel:
    """A step model with these rates, and the uncertainty of the fit."""
    matrix = known.covariance(d.engine, d.gpu)
    spread = float(np.sqrt(np.trace(matrix) / len(matrix) * 2 + NOISE["step"] ** 2))
    return StepModel(
        d,
        rates,
        uncertainty=round(min(spread, 1.0), 3),
        server=ApiServer(rates["request_server"], rates["chunk_server"]),
        start_up=START_UP.get(d.engine, OTHER_START_UP),
        sources=dict.fromkeys(rates, known.source(d.engine, d.gpu)),
    )
