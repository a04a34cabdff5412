"""What tokens cost: by GPU-hours, utilisation, idle time and starts, against hosted models."""

from __future__ import annotations

import msgspec

from millrace.errors import ConfigError
from millrace.plan.facts.prices import ApiPrice, api_prices
from millrace.plan.predict.prediction import Bar, Prediction

MILLION = 1e6
RATIO = 5.0  # dollars of an output token for those of an input token, where none is given


class Cost(msgspec.Struct, frozen=True):
    """Dollars. hour: of all GPUs. million .. output: for a million tokens, blended as they come,
    and of each kind. request: of one. utilisation: share of the time in which it is full."""

    hour: float
    utilisation: float
    million: Bar
    input: Bar
    output: Bar
    request: Bar


class Against(msgspec.Struct, frozen=True):
    """A hosted model. dollars: blended, for a million tokens. break_even: the utilisation above
    which the fleet is cheaper; above 1: never. low, high: of its 80% bar."""

    name: str
    dollars: float
    batch: bool
    same_model: bool
    break_even: float
    low: float
    high: float
    date: str
    source: str


def cost(
    prediction: Prediction, dollars: float, utilisation: float = 1.0, ratio: float = RATIO
) -> Cost:
    """dollars: a GPU-hour. ratio: what an output token costs in input tokens.

    Raises ConfigError for a utilisation that is none.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation {utilisation:g}: use a share above 0, up to 1")
    load = prediction.load
    hour = dollars * prediction.deployment.gpus
    second = hour / 3600 / utilisation
    total = prediction.bars["total_tokens"]
    per_request = prediction.bars["requests"].inverse(second)
    weighted = load.input / ratio + load.output
    each = per_request.times(MILLION / weighted)  # of output tokens
    return Cost(
        hour=hour,
        utilisation=utilisation,
        million=total.inverse(second * MILLION),
        input=each.times(1 / ratio),
        output=each,
        request=per_request,
    )


def million(dollars_an_hour: float, tokens_a_second: float) -> float:
    """Dollars for a million tokens of a fleet that is always full."""
    return dollars_an_hour / 3600 / tokens_a_second * MILLION


def against(found: Cost, input_share: float, *, batch: bool = True) -> list[Against]:
    """The fleet against hosted models, cheapest first. input_share: of the tokens. batch: with the
    prices of batch requests, where there are some."""
    rows = []
    for api in api_prices():
        rows.append(_against(found, api, input_share, 1.0, False))
        if batch and api.batch:
            rows.append(_against(found, api, input_share, 0.5, True))
    return sorted(rows, key=lambda row: row.dollars)


def _against(found: Cost, api: ApiPrice, share: float, factor: float, batch: bool) -> Against:
    dollars = api.blended(share) * factor
    full = found.million.times(found.utilisation)  # at a utilisation of 1
    return Against(
        name=api.name + (", batch" if batch else ""),
        dollars=dollars,
        batch=batch,
        same_model=api.same_model,
        break_even=full.value / dollars,
        low=full.low / dollars,
        high=full.high / dollars,
        date=api.date,
        source=api.source,
    )
