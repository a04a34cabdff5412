"""A batch as a stage of a Ray Dataset: rows with requests in, the same rows with answers out.

    from millrace.offline.ray_data import answer

    rows = ray.data.read_parquet("requests/")  # custom_id, body; url where it is no chat
    answer(rows, base_url=["http://a:8000", "http://b:8000"]).write_parquet("answers/")

Ray moves the rows, starts the stage's actors anywhere in its cluster, and starts them again when
they die. Requests are sent as those of `millrace batch` are: bounded in flight, spread by what
servers finish, sent again where that can help. Without `base_url` each actor runs an engine.

What is answered again after a driver has died is decided by Ray's checkpoints, not here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from millrace.batch.endpoint import Endpoint
from millrace.batch.options import BatchOptions
from millrace.batch.rows import answer_rows
from millrace.batch.run import http_endpoints
from millrace.errors import ConfigError

if TYPE_CHECKING:
    import ray.data

Batch = dict[str, Any]  # columns by name
WAITING_CPUS = 0.25  # of an actor that asks servers
BLOCKS_AT_ONCE = 2  # of an actor: while the last requests of one block end, another's run


class AnswerStage:
    """The actor of the stage. options: as of `millrace batch`. engine: options of the engine that
    it runs; None: servers are asked."""

    def __init__(self, options: BatchOptions, engine: Mapping[str, Any] | None = None) -> None:
        self._options, self._engine = options, engine
        self._endpoints: list[Endpoint] = []
        self._starting = asyncio.Lock()
        self._resources = contextlib.AsyncExitStack()

    async def __call__(self, batch: Batch) -> AsyncIterator[Batch]:
        """The batch's columns, and those of `millrace.batch.rows`."""
        endpoints = await self._started()
        columns = zip(*batch.values(), strict=True)
        rows = [dict(zip(batch, values, strict=True)) for values in columns]
        model = None if self._engine is None else self._options.model
        yield batch | await answer_rows(rows, endpoints, self._options.dispatch(), model)

    async def _started(self) -> list[Endpoint]:
        async with self._starting:
            if not self._endpoints:
                self._endpoints = await self._start()
        return self._endpoints

    async def _start(self) -> list[Endpoint]:
        if self._engine is None:
            return http_endpoints(self._options)
        from millrace.config import engine_args
        from millrace.offline.engine_endpoint import engine_endpoint

        args = engine_args(model=self._options.model, **self._engine)
        endpoint, limit = await self._resources.enter_async_context(engine_endpoint(args))
        each = max(1, min(self._options.max_in_flight, limit // BLOCKS_AT_ONCE))
        self._options = msgspec.structs.replace(self._options, max_in_flight=each)
        return [endpoint]

    async def close(self) -> None:
        """End the engine and all connections."""
        await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints))
        await self._resources.aclose()


def answer(
    dataset: ray.data.Dataset,
    *,
    base_url: str | Sequence[str] = (),
    model: str | None = None,
    engine: Mapping[str, Any] | None = None,
    actors: int = 1,
    rows_at_once: int = 2048,
    num_cpus: float | None = None,
    num_gpus: float = 0.0,
    **options: Any,
) -> ray.data.Dataset:
    """The dataset with an answer in each row: columns status_code, response, error, prompt_tokens,
    output_tokens, cached_tokens.

    base_url: servers. Without one each of the `actors` runs an engine of `model`, with the options
    `engine` (as of `millrace serve`), on `num_cpus` (None: 1; with servers a quarter, for an actor
    waits most of the time) and `num_gpus`. rows_at_once: of a block; many
    times what is in flight. options: as of `millrace batch`; max_in_flight is for each server and
    all actors together. Raises ConfigError.
    """
    urls = [base_url] if isinstance(base_url, str) else list(base_url)
    if engine and urls:
        raise ConfigError("engine: with base_url the servers have engines; leave it out")
    if actors < 1 or rows_at_once < 1:
        raise ConfigError(f"actors {actors}, rows_at_once {rows_at_once}: use 1 or more")
    chosen = _options(urls, model, options)
    if urls:
        share = max(1, chosen.max_in_flight // (actors * BLOCKS_AT_ONCE))
        chosen = msgspec.structs.replace(chosen, max_in_flight=share)
    from ray.data import ActorPoolStrategy

    cpus = num_cpus if num_cpus is not None else WAITING_CPUS if urls else 1.0
    return dataset.map_batches(
        AnswerStage, fn_constructor_args=(chosen, None if urls else dict(engine or {})),
        batch_size=rows_at_once, compute=ActorPoolStrategy(size=actors), num_cpus=cpus,
        num_gpus=num_gpus,
    )  # fmt: skip


def _options(urls: list[str], model: str | None, given: Mapping[str, Any]) -> BatchOptions:
    """Checked. Raises ConfigError."""
    if bool(urls) == (model is not None):
        raise ConfigError("give servers with base_url, or a model to run in the cluster with model")
    if unknown := sorted(set(given) - set(BatchOptions.__struct_fields__)):
        raise ConfigError(f"answer: there is no option {unknown[0]!r}")
    try:
        options = msgspec.convert({**given, "base_url": urls, "model": model}, BatchOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"answer: {error}") from None
    options.dispatch()
    return options
