"""Prices of GPUs and of hosted models, each with its date and source: prices.json.

Where the package genai-prices is installed, its prices of hosted models replace those of the table.
"""

from __future__ import annotations

import functools
from importlib import resources

import msgspec

from millrace.errors import ConfigError
from millrace.hardware.gpus import gpu as find_gpu

KINDS = ("on-demand", "reserved", "spot", "flex")


class GpuPrice(msgspec.Struct, frozen=True):
    """dollars: for a GPU and hour."""

    gpu: str
    provider: str
    kind: str
    dollars: float
    date: str
    source: str


class ApiPrice(msgspec.Struct, frozen=True):
    """Dollars for a million tokens. batch: whether batch requests cost half. same_model: whether it
    hosts Qwen3.5-27B itself. model, provider: as genai-prices names them."""

    name: str
    input: float
    output: float
    batch: bool
    same_model: bool
    date: str
    model: str = ""
    provider: str = ""
    source: str = "table"

    def blended(self, input_share: float) -> float:
        """For a million tokens, of which this share are prompts."""
        return self.input * input_share + self.output * (1 - input_share)


class _Table(msgspec.Struct, frozen=True):
    note: str
    gpus: list[GpuPrice]
    apis: list[ApiPrice]


@functools.cache
def _table() -> _Table:
    content = resources.files("millrace.plan.facts").joinpath("prices.json").read_bytes()
    return msgspec.json.decode(content, type=_Table)


def gpu_prices(gpu: str, kind: str | None = None) -> list[GpuPrice]:
    """The prices of a GPU, cheapest first. Raises ConfigError for an unknown GPU or kind."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind of price {kind!r}; use {', '.join(KINDS)}")
    name = find_gpu(gpu).name
    found = [p for p in _table().gpus if p.gpu == name and kind in (None, p.kind)]
    return sorted(found, key=lambda price: price.dollars)


def price_of(gpu: str, kind: str | None = None, given: float | None = None) -> GpuPrice:
    """The price to plan with: what is given, else the cheapest of the table.

    Raises ConfigError, with what works, if the table has none.
    """
    if given is not None:
        if given <= 0:
            raise ConfigError(f"price {given:g}: use dollars a GPU-hour above 0")
        return GpuPrice(find_gpu(gpu).name, "given", kind or "on-demand", given, "now", "given")
    found = gpu_prices(gpu, kind)
    if not found:
        others = sorted({p.kind for p in gpu_prices(gpu)})
        known = f"{' and '.join(others)} have one; or " if others else ""
        raise ConfigError(f"no {kind or ''} price of {gpu} is known; {known}give --price DOLLARS")
    return found[0]


def api_prices() -> list[ApiPrice]:
    """Hosted models. Those that genai-prices knows have its prices."""
    return [_refreshed(price) for price in _table().apis]


def _refreshed(price: ApiPrice) -> ApiPrice:
    if not price.model:
        return price
    try:
        from genai_prices import Usage, calc_price
    except ImportError:
        return price
    million = 1_000_000
    try:
        sides = [
            float(calc_price(usage, model_ref=price.model, provider_id=price.provider).total_price)
            for usage in (Usage(input_tokens=million), Usage(output_tokens=million))
        ]
    except LookupError:
        return price
    # Some providers charge more for prompts of more than 200,000 tokens; a million is no request.
    if sides[0] > 1.5 * price.input:
        sides = [price.input, price.output]
    return msgspec.structs.replace(price, input=sides[0], output=sides[1], source="genai-prices")
