"""Traces that are asked for and cannot be sent end the start with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from millrace.errors import ConfigError
from millrace.server.http.tracing import Tracer


@pytest.mark.parametrize(("source", "words"), [
    (None, "OpenTelemetry is not installed; pip install 'millrace[otel]'"),
    ("raise ImportError('protobuf')", "cannot be imported (ImportError: protobuf); pip install"),
])  # fmt: skip
def test_without_opentelemetry(
    source: str | None, words: str, replace_package: Callable[[str, str | None], None]
) -> None:
    replace_package("opentelemetry", source)
    with pytest.raises(ConfigError, match=f"^--otlp-traces-endpoint: .*{re.escape(words)}"):
        Tracer.to("http://127.0.0.1:4318/v1/traces")
    assert not Tracer.to(None).active
