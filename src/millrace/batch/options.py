"""Options of `millrace batch`, with their help texts."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from millrace.errors import ConfigError
from millrace.target import Target, parse_base_url


class DispatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """max_in_flight: requests at each endpoint. max_retries: times that a request is sent again
    after an endpoint has failed on it. request_timeout: seconds of one answer. give_up_after:
    seconds without an endpoint that works, after which the run stops. drain: seconds for open
    requests once the run is asked to stop."""

    max_in_flight: int = 256
    max_retries: int = 5
    request_timeout: float = 600.0
    give_up_after: float = 600.0
    drain: float = 30.0


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one run, besides its files. Prices are dollars, of a million tokens or an hour."""

    base_url: list[str] = []
    api_key: str | None = None
    model: str | None = None
    error_file: str | None = None
    max_in_flight: int = 256
    max_retries: int = 5
    request_timeout: float = 600.0
    give_up_after: float = 900.0
    insecure: bool = False
    input_price: float = 0.0
    output_price: float = 0.0
    hourly_price: float = 0.0
    page: str | None = None

    def targets(self) -> list[Target]:
        """The servers. Raises UserError."""
        targets = [parse_base_url(url) for url in self.base_url]
        if len(set(targets)) < len(targets):
            raise ConfigError("--base-url: one server is named twice")
        return [msgspec.structs.replace(one, verify=not self.insecure) for one in targets]

    def dispatch(self) -> DispatchOptions:
        """What the dispatcher is told. Raises ConfigError."""
        for name in ("max_in_flight", "request_timeout", "give_up_after"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} {getattr(self, name)}: use more than 0")
        for name in ("max_retries", "input_price", "output_price", "hourly_price"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} {getattr(self, name)}: use 0 or more")
        return DispatchOptions(
            max_in_flight=self.max_in_flight,
            max_retries=self.max_retries,
            request_timeout=self.request_timeout,
            give_up_after=self.give_up_after,
        )


BATCH_HELP: Mapping[str, str] = {
    "base_url": "An OpenAI-compatible server, such as http://127.0.0.1:8000; without one, MODEL "
    "is run by this command.",
    "api_key": "API key of the servers (default: OPENAI_API_KEY or none).",
    "error_file": "File for requests that fail (default: the output's name with .errors).",
    "max_in_flight": "Requests in flight at each server; as many are sent twice after a kill.",
    "max_retries": "Times that a request is sent again after a server failed on it.",
    "request_timeout": "Seconds that one answer may take.",
    "give_up_after": "Seconds without a server that works, after which the run stops.",
    "insecure": "Do not check the servers' certificates.",
    "input_price": "Dollars for a million prompt tokens, for the cost so far.",
    "output_price": "Dollars for a million output tokens.",
    "hourly_price": "Dollars for an hour of all servers together.",
    "page": "HTML file that shows how far the batch is; it is written anew every few seconds.",
}
