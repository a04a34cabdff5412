"""One run of a batch: from an input file to an output file, over any endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from millrace.batch.dispatcher import Dispatcher
from millrace.batch.endpoint import Endpoint, HttpEndpoint
from millrace.batch.input_file import InputFile
from millrace.batch.journal import Counts, Journal
from millrace.batch.options import BatchOptions
from millrace.batch.progress import Prices, Progress, duration
from millrace.common.http_client import parse_base_url
from millrace.errors import ConfigError


def http_endpoints(options: BatchOptions) -> list[Endpoint]:
    """The servers that the options name. Raises UserError."""
    headers = [("Authorization", f"Bearer {options.api_key}")] if options.api_key else []
    targets = [parse_base_url(url) for url in options.base_url]
    if len(set(targets)) < len(targets):
        raise ConfigError("--base-url: one server is named twice")
    verify = not options.insecure
    return [HttpEndpoint(msgspec.structs.replace(t, verify=verify), headers) for t in targets]


async def run_batch(
    source: InputFile,
    journal: Journal,
    endpoints: Sequence[Endpoint],
    options: BatchOptions,
    say: Callable[[str], None],
    stop: asyncio.Event,
) -> tuple[bool, Counts]:
    """Run a batch whose journal is loaded, to its end or until `stop` is set.

    Returns whether every request has a result, and how far it is. Raises StopError, UserError.
    """
    page = Path(options.page) if options.page else None
    prices = Prices(options.input_price, options.output_price, options.hourly_price)
    progress = Progress(journal, prices, say, page)
    dispatcher = Dispatcher(journal, source, endpoints, options.dispatch(), progress)
    progress.windows = dispatcher.windows
    stopping = asyncio.create_task(_stop_when_set(stop, dispatcher))
    try:
        whole = await dispatcher.run()
    finally:
        stopping.cancel()
        progress.end()
        await asyncio.gather(*(endpoint.close() for endpoint in endpoints))
    say(f"{progress.line()}, in {duration(journal.counts.seconds)}")
    return whole, journal.counts


async def _stop_when_set(stop: asyncio.Event, dispatcher: Dispatcher) -> None:
    await stop.wait()
    dispatcher.stop()
