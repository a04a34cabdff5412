"""What the HTTP front can be told, beside the options of its engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from millrace.text.reasoning import ReasoningParser
from millrace.text.tool_parser import ToolCallParser

LogLevel = Literal["critical", "error", "warning", "info", "debug"]


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one front. Help texts stand in `SERVER_HELP`."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    engine: Literal["millrace", "vllm", "sglang"] = "millrace"
    engine_command: str | None = None
    engine_args: str | None = None
    policy: Literal[
        "least_loaded", "round_robin", "random", "power_of_two", "prefix_aware", "consistent_hash"
    ] = "least_loaded"
    gateway_processes: int = 1
    generation_config: Literal["auto", "vllm"] = "auto"
    reasoning_parser: ReasoningParser = "auto"
    tool_call_parser: ToolCallParser = "auto"
    max_body_bytes: int = 32 * 2**20
    max_bodies_bytes: int = 2**30
    max_header_bytes: int = 64 * 2**10
    read_timeout: float = 30.0
    api_key: list[str] = []
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    allowed_origins: list[str] = []
    allowed_methods: list[str] = []
    allowed_headers: list[str] = []
    allow_credentials: bool = False
    stream_interval: int = 1
    shutdown_timeout: float = 10.0
    max_engine_restarts: int = 3
    enable_request_id_headers: bool = True
    disable_uvicorn_access_log: bool = False
    disable_access_log_for_endpoints: str = "/health,/ping,/metrics,/load"
    otlp_traces_endpoint: str | None = None
    uvicorn_log_level: LogLevel = "warning"


SERVER_HELP: Mapping[str, str] = {
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes a free one.",
    "replicas": "Engines to start, with one gateway in front of them.",
    "engine": "What to start as replicas: Millrace's engine, or another server with these options.",
    "engine_command": "The other server's program, where it is not on PATH.",
    "engine_args": "More options for the other server, in its own words.",
    "policy": "How the gateway picks among replicas.",
    "gateway_processes": "Processes of the gateway.",
    "generation_config": "auto takes the checkpoint's sampling defaults, vllm takes none.",
    "reasoning_parser": "How chat answers are split into reasoning and content; auto does it where "
    "the prompt opens a <think> block, none never.",
    "tool_call_parser": "How calls of tools are found in chat answers; auto knows both of Qwen's "
    "ways, XML (qwen3_coder) and JSON (hermes), none finds none.",
    "max_body_bytes": "Largest request body.",
    "max_bodies_bytes": "Most bytes of bodies that are being read at one time.",
    "max_header_bytes": "Largest request head.",
    "read_timeout": "Seconds that a request's head may take, and each pause in its body.",
    "api_key": "Key that requests must bring (default: MILLRACE_API_KEY, VLLM_API_KEY or none).",
    "ssl_keyfile": "File with the private key for HTTPS.",
    "ssl_certfile": "File with the certificate for HTTPS.",
    "ssl_ca_certs": "File with the authorities that may sign clients' certificates.",
    "ssl_cert_reqs": "Whether clients bring a certificate: 0 no, 1 if they like, 2 they must.",
    "allowed_origins": "Web page whose scripts may call the server; '*' is every page.",
    "allowed_methods": "Method that such scripts may use (default: all).",
    "allowed_headers": "Header that such scripts may send (default: all).",
    "allow_credentials": "Let such scripts send cookies.",
    "stream_interval": "Tokens that a chunk of a stream waits for, after the first one.",
    "shutdown_timeout": "Seconds that open requests get when the server is told to stop.",
    "max_engine_restarts": "Engines that may die in a row before the server ends too; 0: the first "
    "that dies.",
    "enable_request_id_headers": "Give every answer an X-Request-Id: the request's, or a new one.",
    "disable_uvicorn_access_log": "Write no line for each request.",
    "disable_access_log_for_endpoints": "Paths, with commas between, that get no such line.",
    "otlp_traces_endpoint": "Where OpenTelemetry traces go, such as http://127.0.0.1:4318/v1/traces.",
    "uvicorn_log_level": "Log level of the HTTP server.",
}
