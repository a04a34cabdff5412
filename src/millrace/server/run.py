"""The life of one server: listen, start the engine, serve, and leave nothing behind.

The port is bound before the engine loads, so that a port in use is reported at once and /health
answers (503) from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import uvicorn
import uvloop
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from millrace.batch.jobs.api import BatchApi
from millrace.batch.jobs.service import BatchService
from millrace.common.api_errors import shutting_down
from millrace.common.api_keys import configured_keys
from millrace.common.open_files import raise_file_limit
from millrace.common.safe_log import dropped_lines
from millrace.common.sockets import BACKLOG, tls_context
from millrace.common.tasks import reported, restarted, task_failures
from millrace.config import EngineArgs
from millrace.errors import UserError
from millrace.logs.example_request import example_request
from millrace.logs.setup import in_replica
from millrace.model_lookup import find_model
from millrace.protocol import Ready
from millrace.server.api.cache_explain import keep_report
from millrace.server.api.context import ApiContext
from millrace.server.api.formatters import AnswerDefaults
from millrace.server.app import application
from millrace.server.engine_link.client import EngineClient, EngineDeadError
from millrace.server.engine_link.control import EngineControl
from millrace.server.engine_link.process import ENGINE_PROGRAM
from millrace.server.engine_link.restarter import Restarter
from millrace.server.http.access import Access
from millrace.server.http.bodies import BodyReader
from millrace.server.http.connection import connection_class
from millrace.server.http.idempotency import IdempotentRequests
from millrace.server.http.middleware import Middleware
from millrace.server.http.tracing import Tracer
from millrace.server.options import (
    KEY_VARIABLES,
    ServerOptions,
    admin_key,
    api_keys,
    batch_settings,
    gateway_key,
)
from millrace.server.routes import ROUTES
from millrace.server.sandbox.pool import Sandbox, SandboxOptions
from millrace.server.supervisor import (
    hangups_are_ignored,
    inherited_listeners,
    open_listeners,
)
from millrace.server.telemetry.cache_reports import CacheReports
from millrace.server.telemetry.devices import DeviceSampler
from millrace.server.telemetry.live_page import LivePage
from millrace.server.telemetry.load_log import EVERY_SECONDS, LoadLog
from millrace.server.telemetry.metrics import MetricsPage, RequestMetrics, reported_load
from millrace.server.telemetry.samples import Sampler
from millrace.server.telemetry.work_metrics import WorkMetrics
from millrace.text.processor import TextProcessor
from millrace.version import __version__

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 65  # longer than usual proxies keep theirs, so that they close first
CLOSE_SECONDS = 2  # for answers to leave once nothing more is generated


def run_server(
    args: EngineArgs, options: ServerOptions, program: Sequence[str] = ENGINE_PROGRAM
) -> int:
    """Serve until a signal stops it. Returns the exit status: 0, or 1 if the engine died for good.

    Raises UserError for options or a model that cannot work. program: what runs as the engine.
    """
    tls_context(  # uvicorn makes its own; files that cannot be used are to be known now
        options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs, options.ssl_cert_reqs
    )
    raise_file_limit()
    # A prompt is encoded alone: the tokenizer's thread pool would only add a hand-over.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    listeners = inherited_listeners() or open_listeners(options)
    directory = find_model(args.model, args.revision, args.download_dir)
    names = args.served_model_name or [args.model]
    logger.info("%s", _loading_message(names[0], directory, args, listeners[0]))
    args = msgspec.structs.replace(args, model=str(directory))
    with contextlib.ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        return uvloop.run(_serve(args, options, names, listeners, program))


def _loading_message(name: str, directory: Path, args: EngineArgs, listener: socket.socket) -> str:
    """What is said before anything is loaded."""
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    where = listener.getsockname()
    place = where if isinstance(where, str) else f"{where[0]}:{where[1]}"
    several = f", tensor_parallel_size {args.tensor_parallel_size}"
    return (
        f"loading {name} from {directory}: {size / 2**30:.2f} GiB of weights, device "
        f"{args.device}{several if args.tensor_parallel_size > 1 else ''}; {place} listens, and "
        "/health says 503 until it is ready"
    )


class _Parts(NamedTuple):
    """What a server is made of, before its engine runs."""

    args: EngineArgs
    options: ServerOptions
    names: list[str]
    metrics: RequestMetrics
    client: EngineClient
    control: EngineControl
    sandboxes: tuple[Sandbox, Sandbox]  # of grammars, and of prompts to encode
    batches: BatchService
    tracer: Tracer
    sampler: DeviceSampler


async def _serve(
    args: EngineArgs,
    options: ServerOptions,
    names: list[str],
    listeners: list[socket.socket],
    program: Sequence[str],
) -> int:
    """Start the engine, serve until a signal or its death, end what was started."""
    parts = _parts(args, options, names)
    client = parts.client
    await client.start(args, program)
    try:
        page = _metrics_page(parts)
        live = _live_page(names[0], client, parts.metrics, parts.sampler)
        middleware = _http(parts, page, live)
        server = _Server(
            _uvicorn_config(middleware, options), client, middleware, parts.batches,
            options.shutdown_timeout,
        )  # fmt: skip
        _start_batches(parts, listeners[0])
        page.gauges.update(_gauges(middleware, server))
        page.counters.update(_counters())
        chores = _chores(parts, server, live, listeners[0])
        await server.serve(sockets=listeners)
        for task in chores:
            task.cancel()
    finally:
        await _close(parts)
    if isinstance(client.died, UserError):
        raise client.died
    return 0 if client.died is None else 1


def _parts(args: EngineArgs, options: ServerOptions, names: list[str]) -> _Parts:
    metrics = RequestMetrics()
    client = EngineClient(metrics, options.stream_interval)
    sampler = DeviceSampler()
    client.on_ready = lambda ready: sampler.start(ready.devices)
    return _Parts(
        args,
        options,
        names,
        metrics,
        client,
        EngineControl(client),
        make_sandboxes(args),
        BatchService(batch_settings(options), logger.warning),
        Tracer.to(options.otlp_traces_endpoint),
        sampler,
    )


def _metrics_page(parts: _Parts) -> MetricsPage:
    client = parts.client
    return MetricsPage(
        parts.names[0],
        parts.metrics,
        lambda: client.stats,
        lambda: _cache_config(parts.args, client.ready),
        sleep_level=lambda: parts.control.sleep_level or 0,
        up=lambda: client.ready is not None and client.died is None,
        work=WorkMetrics(
            lambda: client.stats.work,
            lambda: "" if client.ready is None else client.ready.device_name,
            lambda: parts.sampler.samples,
        ),
    )


def _http(parts: _Parts, page: MetricsPage, live: LivePage) -> Middleware:
    """The application, and all that a request passes before it."""
    app = make_application(
        parts.args,
        parts.options,
        parts.names,
        parts.client,
        parts.metrics,
        page,
        parts.sandboxes,
        parts.control,
        parts.batches.api,
        live,
    )
    return _middleware(
        IdempotentRequests(app),
        parts.options,
        parts.metrics,
        parts.tracer,
        lambda: reported_load(parts.client.stats),
        parts.client.cache_reports,
    )


def _start_batches(parts: _Parts, listener: socket.socket) -> None:
    """Let batches send their requests to this server, where it has a port."""
    options = parts.options
    if options.uds is not None:
        return
    host, port = listener.getsockname()[:2]
    keys = configured_keys(options.api_key, "--api-key", KEY_VARIABLES)
    parts.batches.start(host, port, bool(options.ssl_certfile), keys[0] if keys else None)


def _chores(
    parts: _Parts, server: _Server, live: LivePage, listener: socket.socket
) -> list[asyncio.Task[None]]:
    """What runs beside the requests."""
    client, (grammars, _) = parts.client, parts.sandboxes
    supervision = _supervise_engine(
        client,
        parts.options,
        server,
        parts.names[0],
        listener,
        grammars.start,
        parts.args.skip_tokenizer_init,
    )
    chores = [
        reported(
            "the supervision of the engine",
            supervision,
            logger.error,
            on_failure=lambda error: _end_unsupervised(client, server, error),
        ),
        restarted("the samples of the live page", live.run, logger.error),
    ]
    if not parts.options.disable_log_stats:
        figures = partial(_log_load, client)
        chores.append(restarted("the figures in the log", figures, logger.error))
    return chores


async def _close(parts: _Parts) -> None:
    """End every process, thread and connection of the parts."""
    sandboxes = (sandbox.close() for sandbox in parts.sandboxes)
    await asyncio.gather(*sandboxes, parts.batches.stop())
    await parts.client.stop()
    parts.tracer.close()
    parts.sampler.close()


def make_application(
    args: EngineArgs,
    options: ServerOptions,
    names: list[str],
    client: EngineClient,
    metrics: RequestMetrics,
    page: MetricsPage,
    sandboxes: tuple[Sandbox, Sandbox],
    control: EngineControl,
    batches: BatchApi | None = None,
    live: LivePage | None = None,
) -> ASGIApp:
    """The API of one engine, without what every HTTP request passes through. names: of the model.
    sandboxes: of `make_sandboxes`. batches: the API of files and batches, if there is one. live:
    what /dashboard shows; None: nothing is."""
    directory = Path(args.model)
    tokenizer = find_model(args.tokenizer) if args.tokenizer else directory
    context = ApiContext(
        client,
        TextProcessor.load(
            directory,
            tokenizer,
            options.generation_config,
            sampling=options.override_generation_config,
            skip_tokenizer=args.skip_tokenizer_init,
            template=options.chat_template,
            template_variables=options.default_chat_template_kwargs,
            max_logprobs=args.max_logprobs,
        ),
        metrics,
        names=names,
        reasoning_parser=options.reasoning_parser,
        tool_call_parser=options.tool_call_parser,
        max_queue=args.max_queue,
        body_reader=BodyReader(
            options.max_body_bytes, options.max_bodies_bytes, options.read_timeout
        ),
        grammars=sandboxes[0],
        encoder=sandboxes[1],
        control=control,
        answers=AnswerDefaults(
            usage=options.enable_force_include_usage,
            tokens_as_ids=options.return_tokens_as_token_ids,
            times=options.enable_per_request_metrics,
        ),
        batches=batches,
        max_stored_responses=options.max_stored_responses,
        max_stored_bytes=options.max_stored_bytes,
    )
    managed = args.debug or admin_key(options) is not None
    return application(context, page, live, root=args.model, managed=managed)


def make_sandboxes(args: EngineArgs) -> tuple[Sandbox, Sandbox]:
    """The processes that build grammars, and the one that encodes long texts."""
    tokenizer = str(find_model(args.tokenizer)) if args.tokenizer else args.model
    grammars = SandboxOptions(
        name="grammars", processes=2, max_queue=64, job_seconds=5.0, memory_bytes=2 << 30
    )
    encoder = SandboxOptions(
        name="long texts",
        processes=1,
        max_queue=16,
        job_seconds=60.0,
        memory_bytes=8 << 30,
        arguments=("--tokenizer", tokenizer),
    )
    return Sandbox(grammars), Sandbox(encoder)


def _middleware(
    app: ASGIApp,
    options: ServerOptions,
    metrics: RequestMetrics,
    tracer: Tracer,
    load: Callable[[], Mapping[str, float]],
    reports: CacheReports,
) -> Middleware:
    unlogged_paths = frozenset(options.disable_access_log_for_endpoints.split(","))
    return Middleware(
        app,
        metrics,
        Access(
            api_keys(options),
            gateway_key(options),
            salt_by_key=options.cache_salt_by_api_key,
            admin_key=admin_key(options),
            admin_paths=[row.path for row in ROUTES if row.manages],
        ),
        add_request_ids=options.enable_request_id_headers,
        unlogged_paths=None if options.disable_uvicorn_access_log else unlogged_paths,
        on_finish=[partial(keep_report, reports), *([tracer.record] if tracer.active else [])],
        root_path=options.root_path,
        load=load,
    )


def _gauges(
    middleware: Middleware, server: uvicorn.Server
) -> dict[str, tuple[str, Callable[[], float]]]:
    """The server's own figures, in which a leak would show."""
    return {
        "http_requests_open": (
            "HTTP requests that are being answered.", lambda: middleware.open_requests
        ),
        "http_connections": (
            "Connections of clients.", lambda: len(server.server_state.connections)
        ),
        "front_tasks": ("Tasks in the server's event loop.", lambda: len(asyncio.all_tasks())),
    }  # fmt: skip


def _counters() -> dict[str, tuple[str, Callable[[], float]]]:
    return {
        "log_lines_dropped": ("Log lines lost because they could not be written.", dropped_lines),
        "task_failures": ("Failures of background tasks.", task_failures),
    }


def _cache_config(args: EngineArgs, ready: Ready | None) -> dict[str, str]:
    """The cache's configuration under the label names of vLLM's cache_config_info."""
    if ready is None:
        return {}
    return {
        "block_size": str(ready.page_size),
        "num_gpu_blocks": str(ready.num_pages - 1),
        "cache_dtype": args.kv_cache_dtype,
        "enable_prefix_caching": str(args.enable_prefix_caching),
        "gpu_memory_utilization": str(args.gpu_memory_utilization),
        "kv_cache_size_tokens": str((ready.num_pages - 1) * ready.page_size),
        "kv_cache_max_concurrency": str(
            round((ready.num_pages - 1) * ready.page_size / ready.max_model_len, 2)
        ),
    }


async def _supervise_engine(
    client: EngineClient,
    options: ServerOptions,
    server: uvicorn.Server,
    name: str,
    listener: socket.socket,
    on_ready: Callable[[], None],
    token_ids: bool,
) -> None:
    """Print that the engine is ready, restart it when it dies, end the server at its last death.

    on_ready: called once, with the first Ready.
    """
    with contextlib.suppress(UserError, EngineDeadError):
        ready = await client.wait_ready()
        on_ready()
        scheme = "https" if options.ssl_certfile else "http"
        logger.info("%s", _startup_message(ready, name, scheme, listener, token_ids))
    await Restarter(client, options.max_engine_restarts).run()
    server.should_exit = True


def _live_page(
    name: str, client: EngineClient, metrics: RequestMetrics, sampler: DeviceSampler
) -> LivePage:
    about = {"kind": "server", "name": name, "version": __version__}
    samples = Sampler(lambda: client.stats, metrics, lambda: sampler.samples)
    return LivePage(samples, partial(_engine_state, client), about)


def _engine_state(client: EngineClient) -> tuple[str, str]:
    """What the engine does, in a word, and why."""
    if client.died is not None:
        return "down", str(client.died)[:300]
    if client.draining:
        return "draining", "the server is told to stop"
    if client.refusal is not None:
        return client.refusal, ""
    return ("up", "") if client.ready is not None else ("loading", "")


async def _log_load(client: EngineClient) -> None:
    """A line of figures every ten seconds under load."""
    log = LoadLog(lambda: client.stats)
    while True:
        await asyncio.sleep(EVERY_SECONDS)
        log.write()


def _end_unsupervised(client: EngineClient, server: uvicorn.Server, error: Exception) -> None:
    """End the server with a failure: nothing would restart its engine."""
    client.died = client.died or error
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn with an orderly stop.

    After a first signal it goes on answering open requests, for `limit` seconds at most; new
    requests and /health get 503 meanwhile. After a second signal it ends at once. Signals do not
    change the exit status.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        client: EngineClient,
        middleware: Middleware,
        batches: BatchService,
        limit: float,
    ) -> None:
        super().__init__(config)
        self._client = client
        self._middleware = middleware
        self._batches = batches
        self._limit = limit
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does it, but the signal is not raised again after the server has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or not hangups_are_ignored():
                loop.add_signal_handler(number, self._stop)
        faulthandler.register(signal.SIGUSR1)  # for a look at its stacks while it runs
        yield

    def _stop(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._client.fail_all(shutting_down())
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        self._client.draining = True
        await self._batches.stop()  # its requests go on after the next start
        logger.info(
            "stopping: %d requests are open and have %g s to end; a second signal ends them",
            self._middleware.open_requests, self._limit,
        )  # fmt: skip
        if not await self._middleware.wait_idle(self._limit):
            self._client.fail_all(shutting_down())
        self.should_exit = True


def _uvicorn_config(middleware: Middleware, options: ServerOptions) -> uvicorn.Config:
    app: ASGIApp = middleware
    if options.allowed_origins:
        app = CORSMiddleware(
            middleware,
            allow_origins=options.allowed_origins,
            allow_methods=options.allowed_methods or ["*"],
            allow_headers=options.allowed_headers or ["*"],
            allow_credentials=options.allow_credentials,
            expose_headers=["X-Request-Id"],
        )
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=connection_class(options.read_timeout, options.max_header_bytes),
        ws="none",
        lifespan="off",
        log_config=None,  # its lines have the format of ours
        log_level=options.uvicorn_log_level,
        access_log=False,  # the middleware writes a line that says more
        server_header=False,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        backlog=BACKLOG,
    )


def _startup_message(
    ready: Ready, name: str, scheme: str, listener: socket.socket, token_ids: bool
) -> str:
    """What is printed when the engine is ready. token_ids: prompts must be token ids."""
    socket_path = ""
    if listener.family == socket.AF_UNIX:
        url, socket_path = f"{scheme}://localhost", str(listener.getsockname())
    else:
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        url = f"{scheme}://{host}:{port}"
    if in_replica():  # clients ask the gateway, which says how
        return f"{ready.summary}\nready at {url}"
    where = f" --unix-socket {socket_path}" if socket_path else ""
    return (
        f"{ready.summary}\nMillrace serves {name} at {url}{where}. Try:\n"
        f"  {example_request(url, name, token_ids=token_ids, socket=socket_path)}"
    )
