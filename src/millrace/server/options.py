"""Options of the API server, beside those of its engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from millrace.batch.jobs.settings import BatchSettings, read_settings
from millrace.common.api_keys import configured_keys
from millrace.errors import ConfigError
from millrace.logs.otlp import HELP as OTLP_HELP
from millrace.logs.setup import LOG_HELP, LogFormat, LogLevel
from millrace.text.reasoning import ReasoningParser
from millrace.text.tools.parser import ToolCallParser

logger = logging.getLogger(__name__)

KEY_VARIABLES = ("MILLRACE_API_KEY", "VLLM_API_KEY")
GATEWAY_KEY_VARIABLE = "MILLRACE_GATEWAY_API_KEY"
ADMIN_KEY_VARIABLE = "MILLRACE_SERVER_ADMIN_KEY"


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one API server. `SERVER_HELP` has the help texts."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    replicas: int = 1
    engine: Literal["millrace", "vllm", "sglang"] = "millrace"
    engine_command: str | None = None
    engine_args: str | None = None
    policy: Literal[
        "least_loaded", "round_robin", "random", "power_of_two", "prefix_aware", "consistent_hash"
    ] = "prefix_aware"
    gateway_processes: int = 1
    generation_config: Literal["auto", "vllm"] = "auto"
    override_generation_config: dict[str, Any] = {}
    chat_template: str | None = None
    default_chat_template_kwargs: dict[str, Any] = {}
    reasoning_parser: ReasoningParser = "auto"
    tool_call_parser: ToolCallParser = "auto"
    max_body_bytes: int = 32 * 2**20
    max_bodies_bytes: int = 2**30
    max_header_bytes: int = 64 * 2**10
    read_timeout: float = 30.0
    api_key: list[str] = []
    gateway_api_key: str | None = None
    cache_salt_by_api_key: bool = False
    admin_key: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    allowed_origins: list[str] = []
    allowed_methods: list[str] = []
    allowed_headers: list[str] = []
    allow_credentials: bool = False
    stream_interval: int = 1
    max_stored_responses: int = 1000
    max_stored_bytes: int = 256 * 2**20
    batch_dir: str | None = None
    batch_dir_gb: float = 50.0
    batch_max_in_flight: int = 64
    shutdown_timeout: float = 10.0
    max_engine_restarts: int = 3
    max_server_restarts: int = 3
    enable_request_id_headers: bool = True
    enable_force_include_usage: bool = False
    enable_per_request_metrics: bool = False
    return_tokens_as_token_ids: bool = False
    disable_uvicorn_access_log: bool = False
    disable_access_log_for_endpoints: str = "/health,/ping,/metrics,/load"
    otlp_traces_endpoint: str | None = None
    uvicorn_log_level: LogLevel = "warning"
    log_level: LogLevel | None = None
    log_format: LogFormat | None = None
    disable_log_stats: bool = False


SERVER_HELP: Mapping[str, str] = {
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes a free one.",
    "uds": "Unix socket to listen on, for this user alone, instead of host and port.",
    "root_path": "Prefix that a proxy in front leaves in paths, such as /llm; paths without it "
    "work too.",
    "replicas": "Replicas to start behind one gateway.",
    "engine": "What to start as replicas: Millrace's own engine, or another server (vllm, sglang).",
    "engine_command": "Program of the other server, if it is not on PATH.",
    "engine_args": "More options for the other server, passed on unchanged.",
    "policy": "How the gateway picks among replicas.",
    "gateway_processes": "Processes of the gateway.",
    "generation_config": "auto takes the checkpoint's sampling defaults, vllm takes none.",
    "override_generation_config": "JSON that replaces sampling defaults, such as "
    '{"temperature": 0.6}.',
    "chat_template": "File with a chat template, or the template itself, instead of the "
    "checkpoint's.",
    "default_chat_template_kwargs": "JSON with variables of the chat template, such as "
    '{"enable_thinking": false}; those of a request come first.',
    "reasoning_parser": "How chat answers are split into reasoning and content. auto: where the "
    "prompt opens a <think> block; none: never.",
    "tool_call_parser": "Format of tool calls in chat answers. auto: both of Qwen's formats, XML "
    "(qwen3_coder) and JSON (hermes); none: calls are not parsed.",
    "max_body_bytes": "Most bytes of one request body.",
    "max_bodies_bytes": "Most bytes of all request bodies that are being read at the same time; "
    "beyond that requests get status 429.",
    "max_header_bytes": "Most bytes of one request's headers.",
    "read_timeout": "Seconds within which a request's headers must arrive, and each further "
    "part of its body.",
    "api_key": "API key that requests must send (default: MILLRACE_API_KEY, VLLM_API_KEY or none).",
    "gateway_api_key": "Key of the gateway; where there are keys, only a request with this key may "
    "ask which prefixes are cached (default: MILLRACE_GATEWAY_API_KEY or none).",
    "admin_key": "Offer /pause, /sleep, /reset_prefix_cache and the like, to requests with this "
    "key (default: MILLRACE_SERVER_ADMIN_KEY or none).",
    "cache_salt_by_api_key": "Share cached prefixes only among requests of the same API key.",
    "ssl_keyfile": "File with the private key for HTTPS.",
    "ssl_certfile": "File with the certificate for HTTPS.",
    "ssl_ca_certs": "File with the authorities that may sign clients' certificates.",
    "ssl_cert_reqs": "Client certificates: 0 not asked for, 1 optional, 2 required.",
    "allowed_origins": "Origin whose web pages may call the server (CORS); '*' allows "
    "every origin.",
    "allowed_methods": "HTTP method that such pages may use (default: all).",
    "allowed_headers": "Header that such pages may send (default: all).",
    "allow_credentials": "Allow such pages to send cookies.",
    "stream_interval": "Tokens in one chunk of a stream, after its first chunk.",
    "max_stored_responses": "Responses that /v1/responses keeps in memory for later requests; 0 "
    "keeps none.",
    "max_stored_bytes": "Most bytes of stored responses and the conversations before them.",
    "batch_dir": "Directory for /v1/files and /v1/batches; what is in it outlives the server.",
    "batch_dir_gb": "Most gigabytes of all files there.",
    "batch_max_in_flight": "Requests that one batch has in flight.",
    "shutdown_timeout": "Seconds that open requests get to finish when the server stops.",
    "max_engine_restarts": "Times in a row that the engine is started again after it died; after "
    "after that the server ends too.",
    "max_server_restarts": "Times in a row that the server process is started again after a crash; "
    "0 runs it without a parent process that watches it.",
    "enable_request_id_headers": "Give every answer an X-Request-Id header: the request's, or a "
    "new one.",
    "enable_force_include_usage": "Put the token counts into every chunk of streams of the OpenAI "
    "endpoints, and at their ends.",
    "enable_per_request_metrics": "Put the times of a request into answers with one output.",
    "return_tokens_as_token_ids": "Write tokens in log-probabilities as token_id:17 for requests "
    "that say nothing.",
    "disable_uvicorn_access_log": "Write no access log.",
    "disable_access_log_for_endpoints": "Paths, separated by commas, that are left out of the "
    "access log.",
    "otlp_traces_endpoint": OTLP_HELP,
    "uvicorn_log_level": "Log level of the HTTP server.",
    **LOG_HELP,
    "disable_log_stats": "Write no line of figures every 10 seconds under load.",
}


def batch_settings(options: ServerOptions) -> BatchSettings | None:
    """Where and how batches run; None where they do not. Raises ConfigError."""
    if options.batch_dir is None:
        return None
    if options.uds:
        raise ConfigError("--batch-dir needs a port, at which it sends requests; leave out --uds")
    if options.ssl_cert_reqs == 2:
        raise ConfigError("--batch-dir has no client certificate; use --ssl-cert-reqs 0 or 1")
    return read_settings(options.batch_dir, options.batch_dir_gb, options.batch_max_in_flight)


def api_keys(options: ServerOptions) -> list[str]:
    """The keys that requests must bring one of: from --api-key, else from the environment.

    Raises ConfigError for an empty one. Warns where there is none and other hosts may connect.
    """
    keys = configured_keys(options.api_key, "--api-key", KEY_VARIABLES)
    if not keys and options.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning(
            "listening on %s without --api-key: whoever reaches it may use it", options.host
        )
    return keys


def gateway_key(options: ServerOptions) -> str | None:
    """The key of this replica's gateway, if it has one. Raises ConfigError for an empty one."""
    given = [] if options.gateway_api_key is None else [options.gateway_api_key]
    keys = configured_keys(given, "--gateway-api-key", [GATEWAY_KEY_VARIABLE])
    return keys[0] if keys else None


def admin_key(options: ServerOptions) -> str | None:
    """The key of whoever manages this server, if there is one. Raises ConfigError for an empty
    one."""
    given = [] if options.admin_key is None else [options.admin_key]
    keys = configured_keys(given, "--admin-key", [ADMIN_KEY_VARIABLE])
    return keys[0] if keys else None


def check_keys(options: ServerOptions) -> None:
    """Raise ConfigError for an empty key, and for salts by key without keys."""
    keys = configured_keys(options.api_key, "--api-key", KEY_VARIABLES)
    gateway_key(options)
    admin_key(options)
    if options.cache_salt_by_api_key and not keys:
        raise ConfigError("--cache-salt-by-api-key needs --api-key: without keys all are the same")
