"""`millrace serve`: the options, and which of three things it runs.

A server with one engine; with --replicas, several servers behind a gateway; under torchrun with a
rank above 0, one rank of an engine that rank 0 serves.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

import click
import msgspec

from millrace.common.flags import given, struct_options
from millrace.common.safe_log import protect_standard_streams
from millrace.config import HELP, EngineArgs, engine_args
from millrace.errors import ConfigError
from millrace.logs.setup import LogOptions, set_up_logs
from millrace.model_lookup import find_model
from millrace.server.help import write_options
from millrace.server.options import (
    GATEWAY_KEY_VARIABLE,
    SERVER_HELP,
    ServerOptions,
    api_keys,
    check_keys,
    gateway_key,
)
from millrace.server.vllm_arguments import Options, rewrite
from millrace.version import __version__

logger = logging.getLogger(__name__)

ENGINE_END_SECONDS = 10.0  # that a replica's engine may take to end, once its requests have


class _ServeCommand(click.Command):
    """Takes the flags of vLLM too, keeps its arguments as read, and has help in groups."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = [self._help_topic(ctx, word) for word in args]
        arguments, notes = rewrite(args, Options.of(self))
        if notes:
            click.echo(f"{ctx.command_path}: without effect: {'; '.join(notes)}", err=True)
        ctx.meta["millrace.arguments"] = arguments
        try:
            return super().parse_args(ctx, list(arguments))
        except click.NoSuchOption as error:
            close = get_close_matches(error.option_name, error.possibilities or (), cutoff=0.8)
            raise click.NoSuchOption(
                error.option_name, possibilities=close, ctx=error.ctx
            ) from None

    def _help_topic(self, ctx: click.Context, word: str) -> str:
        if not word.startswith("--help="):
            return word
        ctx.meta["millrace.help"] = word.removeprefix("--help=").lower()
        return "--help"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.params if isinstance(param, click.Option)]
        write_options(ctx, formatter, options, ctx.meta.get("millrace.help", ""))


# Options of the gateway in front of several replicas, which the replicas do not get.
_GATEWAY_OPTIONS = (
    *("--replicas", "--host", "--port", "--policy", "--gateway-processes", "--engine"),
    *("--ssl-certfile", "--ssl-keyfile"),
    *("--batch-dir", "--batch-dir-gb", "--batch-max-in-flight"),
)


@click.command(cls=_ServeCommand)
@click.argument("model")
@struct_options(ServerOptions, SERVER_HELP)
@struct_options(EngineArgs, HELP, skip=frozenset({"model"}))
@click.pass_context
def serve(ctx: click.Context, /, model: str, **values: Any) -> None:
    """Serve MODEL over an OpenAI-compatible API.

    MODEL is a directory with a Hugging Face checkpoint, the id of one in the Hugging Face cache,
    or the name of a model that ships.
    """
    args = engine_args(model=model, **given(values, EngineArgs))
    options = msgspec.convert(given(values, ServerOptions), ServerOptions)
    _check(options)
    protect_standard_streams()
    logs = LogOptions(log_level=options.log_level, log_format=options.log_format)
    set_up_logs(_source(options), logs)
    if options.engine != "millrace":
        _serve_others(args, options, values)
    elif options.replicas > 1:
        _serve_replicas(args, options, ctx.meta["millrace.arguments"])
    elif int(os.environ.get("RANK", "0")) > 0:
        from millrace.replica.build import run_rank

        ctx.exit(run_rank(args))
    else:
        ctx.exit(_serve_one(args, options, ctx.meta["millrace.arguments"]))


def _source(options: ServerOptions) -> str:
    """What this process is called in the log."""
    if options.replicas > 1 or options.engine != "millrace":
        return "supervisor"
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        return f"rank {rank}"
    return "supervisor" if _supervises(options) else "server"


def _supervises(options: ServerOptions) -> bool:
    """Whether the server is to be a child of this process."""
    from millrace.server.supervisor import is_supervised

    return bool(options.max_server_restarts) and not is_supervised() and "RANK" not in os.environ


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
    positive = ("read_timeout", "shutdown_timeout", "max_engine_restarts", "max_server_restarts")
    for name in (*positive, "max_stored_responses", "max_stored_bytes"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise ConfigError(f"{name} {getattr(options, name)}: use 0 or more")
    if options.engine == "millrace" and (options.engine_args or options.engine_command):
        raise ConfigError("--engine-args and --engine-command go with --engine vllm or sglang")
    check_keys(options)
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"port {options.port}: use 0 to 65535")


def _serve_one(args: EngineArgs, options: ServerOptions, arguments: list[str]) -> int:
    """A server in this process, or one that this process watches. Returns the exit status."""
    from millrace.common.child_process import python_module
    from millrace.common.sockets import tls_context
    from millrace.server.supervisor import open_listeners, supervise

    if not _supervises(options):
        from millrace.server.run import run_server

        return run_server(args, options)
    tls_context(  # what cannot work is reported here, once
        options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs, options.ssl_cert_reqs
    )
    listeners = open_listeners(options)
    find_model(args.model, args.revision, args.download_dir)
    logger.info("Millrace %s", __version__)
    command = python_module("millrace.cli", "serve", *arguments)
    return supervise(command, listeners, options.max_server_restarts)


def _serve_replicas(args: EngineArgs, options: ServerOptions, arguments: list[str]) -> None:
    from millrace.common.child_process import python_module

    find_model(args.model, args.revision, args.download_dir)
    own = without_options(arguments, _GATEWAY_OPTIONS)
    # The gateway's supervisor restarts them.
    command = python_module("millrace.cli", "serve", *own, "--max-server-restarts", "0")
    _run_replicas(command, args, options, {})


def _serve_others(args: EngineArgs, options: ServerOptions, values: dict[str, Any]) -> None:
    """Another server's engines behind our gateway."""
    from millrace.fleet.drivers import ENVIRONMENT, engine_command

    options_given = {**given(values, EngineArgs), **given(values, ServerOptions)}
    command = engine_command(
        options.engine,
        args.model,
        options_given,
        own=options.engine_args or "",
        program=options.engine_command or "",
    )
    _run_replicas(command, args, options, ENVIRONMENT)


def _run_replicas(
    command: list[str], args: EngineArgs, options: ServerOptions, more: Mapping[str, str]
) -> None:
    """more: variables of the replicas' environment."""
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
                allowed_origins=options.allowed_origins,
            ),
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            merge_metrics=True,
            batch_dir=options.batch_dir,
            batch_dir_gb=options.batch_dir_gb,
            batch_max_in_flight=options.batch_max_in_flight,
            disable_log_stats=options.disable_log_stats,
            otlp_traces_endpoint=options.otlp_traces_endpoint,
        ),
        device=args.device,
        gpus_per_replica=args.tensor_parallel_size,
        stop_timeout=options.shutdown_timeout + ENGINE_END_SECONDS,
        environment={**more, **environment},
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
