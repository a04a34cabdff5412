"""`millrace serve`: the options, and which of three things it runs.

A server with one engine; with --replicas, several servers behind a gateway; under torchrun with a
rank above 0, one rank of an engine that rank 0 serves.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Collection
from typing import Any

import click
import msgspec

from millrace.common.flags import given, struct_options
from millrace.common.safe_log import protect_standard_streams
from millrace.config import HELP, EngineArgs, engine_args
from millrace.errors import ConfigError
from millrace.model_lookup import find_model
from millrace.server.options import (
    GATEWAY_KEY_VARIABLE,
    SERVER_HELP,
    ServerOptions,
    api_keys,
    check_keys,
    gateway_key,
)

ENGINE_END_SECONDS = 10.0  # that a replica's engine may take to end, once its requests have


class _RawArgumentsCommand(click.Command):
    """A command that keeps its arguments as they were written."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["millrace.arguments"] = list(args)
        return super().parse_args(ctx, args)


# Options of the gateway in front of several replicas, which the replicas do not get.
_GATEWAY_OPTIONS = (
    *("--replicas", "--host", "--port", "--policy", "--gateway-processes", "--engine"),
    *("--ssl-certfile", "--ssl-keyfile"),
)


@click.command(cls=_RawArgumentsCommand)
@click.argument("model")
@struct_options(ServerOptions, SERVER_HELP)
@struct_options(EngineArgs, HELP, skip=frozenset({"model"}))
@click.pass_context
def serve(ctx: click.Context, /, model: str, **values: Any) -> None:
    """Serve MODEL over an OpenAI-compatible API.

    MODEL is a directory with a Hugging Face checkpoint, or the name of a model that ships.
    """
    args = engine_args(model=model, **given(values, EngineArgs))
    options = msgspec.convert(given(values, ServerOptions), ServerOptions)
    _check(options)
    protect_standard_streams()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if options.engine != "millrace":
        _serve_others(args, options, values)
    elif options.replicas > 1:
        _serve_replicas(args, options, ctx.meta["millrace.arguments"])
    elif int(os.environ.get("RANK", "0")) > 0:
        from millrace.replica.build import run_rank

        ctx.exit(run_rank(args))
    else:
        from millrace.server.run import run_server

        ctx.exit(run_server(args, options))


def _check(options: ServerOptions) -> None:
    counts = ("replicas", "max_body_bytes", "max_bodies_bytes", "max_header_bytes")
    for name in (*counts, "stream_interval"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} {getattr(options, name)}: use 1 or more")
    if options.max_bodies_bytes < options.max_body_bytes:
        raise ConfigError(
            f"max_bodies_bytes {options.max_bodies_bytes}: use at least max_body_bytes, "
            f"{options.max_body_bytes}, or a body of that size is never taken"
        )
    for name in ("read_timeout", "shutdown_timeout", "max_engine_restarts"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise ConfigError(f"{name} {getattr(options, name)}: use 0 or more")
    if options.engine == "millrace" and (options.engine_args or options.engine_command):
        raise ConfigError("--engine-args and --engine-command go with --engine vllm or sglang")
    check_keys(options)
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"port {options.port}: use 0 to 65535")


def _serve_replicas(args: EngineArgs, options: ServerOptions, arguments: list[str]) -> None:
    find_model(args.model)
    own = without_options(arguments, _GATEWAY_OPTIONS)
    _run_replicas([sys.executable, "-m", "millrace.cli", "serve", *own], args, options)


def _serve_others(args: EngineArgs, options: ServerOptions, values: dict[str, Any]) -> None:
    """Another server's engines behind our gateway."""
    from millrace.fleet.drivers import engine_command

    options_given = {**given(values, EngineArgs), **given(values, ServerOptions)}
    command = engine_command(
        options.engine,
        args.model,
        options_given,
        own=options.engine_args or "",
        program=options.engine_command or "",
    )
    _run_replicas(command, args, options)


def _run_replicas(command: list[str], args: EngineArgs, options: ServerOptions) -> None:
    from millrace.fleet.supervisor import run_replicas
    from millrace.gateway.common.limits import GatewayLimits
    from millrace.gateway.processes.options import GatewayOptions
    from millrace.gateway.relay.access import Access

    keys = api_keys(options)
    worker_key, environment = _worker_key(options, keys)
    run_replicas(
        command,
        options.replicas,
        options.host,
        options.port,
        gateway=GatewayOptions(
            policy=options.policy,
            processes=options.gateway_processes,
            limits=GatewayLimits(
                max_body_bytes=options.max_body_bytes, max_bodies_bytes=options.max_bodies_bytes
            ),
            access=Access(
                api_key=keys,
                worker_api_key=worker_key,
                cache_salt_by_api_key=options.cache_salt_by_api_key,
            ),
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            merge_metrics=True,
        ),
        device=args.device,
        gpus_per_replica=args.tensor_parallel_size,
        stop_timeout=options.shutdown_timeout + ENGINE_END_SECONDS,
        environment=environment,
    )


def _worker_key(options: ServerOptions, keys: list[str]) -> tuple[str | None, dict[str, str]]:
    """The key that the gateway sends to the replicas, and the variables by which they know it.

    Millrace's replicas get a key that no client has: they tell only the gateway what is cached.
    """
    if not keys:
        return None, {}
    if options.engine != "millrace":
        return keys[0], {}
    key = gateway_key(options) or secrets.token_urlsafe(32)
    return key, {GATEWAY_KEY_VARIABLE: key}


def without_options(arguments: list[str], flags: Collection[str]) -> list[str]:
    """The arguments less options that take a value, written with a space or with `=`."""
    kept = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in flags:
            kept.append(argument)
        elif not equals:
            next(rest, None)  # the option's value
    return kept
