"""What the HTTP front can be told, beside the options of its engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from millrace.text.reasoning import ReasoningParser

LogLevel = Literal["critical", "error", "warning", "info", "debug"]


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one front. Help texts stand in `SERVER_HELP`."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    generation_config: Literal["auto", "vllm"] = "auto"
    reasoning_parser: ReasoningParser = "auto"
    max_body_bytes: int = 32 * 2**20
    uvicorn_log_level: LogLevel = "warning"


SERVER_HELP: Mapping[str, str] = {
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes a free one.",
    "replicas": "Engines to start, with one relay in front of them.",
    "generation_config": "auto takes the checkpoint's sampling defaults, vllm takes none.",
    "reasoning_parser": "How chat answers are split into reasoning and content; auto does it where "
    "the prompt opens a <think> block, none never.",
    "max_body_bytes": "Largest request body.",
    "uvicorn_log_level": "Log level of the HTTP server; info logs every request.",
}
