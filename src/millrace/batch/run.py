"""One run of a batch: from an input file to an output file, over any endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from millrace.batch.dispatcher import Dispatcher
from millrace.batch.endpoint import Endpoint, HttpEndpoint
from millrace.batch.input_file import InputFile
from millrace.batch.journal import Journal
from millrace.batch.options import BatchOptions
from millrace.batch.progress import Prices, Progress, duration


def http_endpoints(options: BatchOptions) -> list[Endpoint]:
    """The servers that the options name. Raises UserError."""
    headers = [("Authorization", f"Bearer {options.api_key}")] if options.api_key else []
    return [HttpEndpoint(target, headers) for target in options.targets()]


async def run_batch(
    source: InputFile,
    journal: Journal,
    endpoints: Sequence[Endpoint],
    options: BatchOptions,
    say: Callable[[str], None],
    stop: asyncio.Event,
) -> bool:
    """Run a batch whose journal is loaded, to its end or until `stop` is set.

    Returns whether every request has a result. Raises StopError, UserError.
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
    return whole


async def _stop_when_set(stop: asyncio.Event, dispatcher: Dispatcher) -> None:
    await stop.wait()
    dispatcher.stop()
