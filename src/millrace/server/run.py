"""The life of one server: listen, start the engine, serve, and leave nothing behind.

The port is taken before the engine loads, so that a port in use is known at once and /health
answers (503) from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import uvicorn
import uvloop

from millrace.config import EngineArgs
from millrace.errors import ConfigError, UserError
from millrace.models import find_model
from millrace.protocol import Ready
from millrace.server.app import Api
from millrace.server.engine_client import EngineClient, EngineDeadError
from millrace.server.engine_process import ENGINE_PROGRAM
from millrace.server.errors import ApiError
from millrace.server.metrics import RequestMetrics
from millrace.server.options import ServerOptions
from millrace.text.codec import Codec

DRAIN_SECONDS = 5.0  # that open requests get when the server is told to stop
KEEP_ALIVE_SECONDS = 65  # longer than usual proxies keep theirs, so that they close first


def run_server(
    args: EngineArgs, options: ServerOptions, program: Sequence[str] = ENGINE_PROGRAM
) -> int:
    """Serve until told to stop. Returns the exit status: 0, or 1 if the engine died.

    Raises UserError for options or a model that cannot work. program: what runs as the engine.
    """
    listener = _listen(options.host, options.port)
    directory = find_model(args.model)
    names = args.served_model_name or [args.model]
    args = msgspec.structs.replace(args, model=str(directory))
    with listener:
        return uvloop.run(_serve(args, options, names, listener, program))


async def _serve(
    args: EngineArgs,
    options: ServerOptions,
    names: list[str],
    listener: socket.socket,
    program: Sequence[str],
) -> int:
    metrics = RequestMetrics()
    client = EngineClient(metrics)
    await client.start(args, program)
    try:
        directory = Path(args.model)
        tokenizer = find_model(args.tokenizer) if args.tokenizer else directory
        api = Api(
            client,
            Codec.load(directory, tokenizer, options.generation_config),
            metrics,
            names=names,
            root=args.model,
            reasoning_parser=options.reasoning_parser,
            max_queue=args.max_queue,
            max_body_bytes=options.max_body_bytes,
        )
        server = _Server(_uvicorn_config(api, options), client)
        watch = asyncio.create_task(_watch(client, server, names[0], listener))
        await server.serve(sockets=[listener])
        watch.cancel()
    finally:
        await client.stop()
    if isinstance(client.died, UserError):
        raise client.died
    return 0 if client.died is None else 1


async def _watch(
    client: EngineClient, server: uvicorn.Server, name: str, listener: socket.socket
) -> None:
    """Say when the engine is ready; end the server when it is dead."""
    with contextlib.suppress(UserError, EngineDeadError):
        ready = await client.wait_ready()
        print(_welcome(ready, name, listener), flush=True)
    await client.wait_died()
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn, ending as a program should: open requests get an answer, the exit status is ours."""

    def __init__(self, config: uvicorn.Config, client: EngineClient) -> None:
        super().__init__(config)
        self._client = client

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does it, but the signal is not raised again after the server has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = ApiError(503, "the server is shutting down", code="shutting_down")
        late = asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._client.fail_all, stopping)
        await super().shutdown(sockets)
        late.cancel()


def _uvicorn_config(api: Api, options: ServerOptions) -> uvicorn.Config:
    level = options.uvicorn_log_level
    return uvicorn.Config(
        api.application(),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_level=level,
        access_log=level in ("info", "debug"),
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(DRAIN_SECONDS) + 2,
        backlog=4096,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError if that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host!r}: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port"
        ) from None
    listener.setblocking(False)
    return listener


def _welcome(ready: Ready, name: str, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{port}"
    example = msgspec.json.encode(
        {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    ).decode()
    return (
        f"{ready.summary}\n"
        f"Millrace serves {name} at {url}. Try:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{example}'"
    )
