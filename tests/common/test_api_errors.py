"""Errors: the status decides type, code and headers; messages have a bound."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.common.api_errors import (
    LONGEST_MESSAGE,
    ApiError,
    no_access,
    shortened,
    shutting_down,
)


@pytest.mark.parametrize(
    ("status", "kind", "code", "anthropic"),
    [
        (400, "invalid_request_error", None, "invalid_request_error"),
        (401, "authentication_error", "invalid_api_key", "authentication_error"),
        (403, "permission_error", "forbidden", "permission_error"),
        (404, "not_found_error", "not_found", "not_found_error"),
        (405, "invalid_request_error", "method_not_allowed", "invalid_request_error"),
        (408, "timeout_error", "request_timeout", "timeout_error"),
        (413, "invalid_request_error", "body_too_large", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
        (500, "server_error", "internal_error", "api_error"),
        (502, "bad_gateway_error", "bad_gateway", "api_error"),
        (503, "service_unavailable_error", "unavailable", "overloaded_error"),
        (504, "timeout_error", "timeout", "timeout_error"),
    ],
)
def test_the_status_decides(status: int, kind: str, code: str | None, anthropic: str) -> None:
    error = ApiError(status, "what is wrong")
    told = {"message": "what is wrong", "type": kind, "param": None, "code": code}
    assert json.loads(error.encode()) == {"error": told}
    assert json.loads(error.encode("/v1/messagesx")) == {"error": told}
    other = {"type": "error", "error": {"type": anthropic, "message": "what is wrong"}}
    assert json.loads(error.encode("/v1/messages")) == other
    assert json.loads(error.encode("/v1/messages/count_tokens")) == other
    assert ("Retry-After" in error.headers) == (status in (429, 502, 503))
    assert ("WWW-Authenticate" in error.headers) == (status == 401)


def test_what_is_given_goes_before_what_the_status_has() -> None:
    error = ApiError(503, "x", code="engine_dead", param="n", headers={"Retry-After": "7"})
    assert (error.code, error.headers) == ("engine_dead", {"Retry-After": "7"})
    assert error.body.error.param == "n"


def test_errors_that_server_and_gateway_share() -> None:
    assert str(no_access(given=False)).startswith("no API key; send one as")
    assert str(no_access(given=True)).startswith("incorrect API key; send one as")
    assert (no_access(True).status, no_access(True).code) == (401, "invalid_api_key")
    assert (shutting_down().status, shutting_down().code) == (503, "shutting_down")


@given(text=st.text(max_size=50), times=st.integers(1, 2000))
def test_a_message_has_a_bound(text: str, times: int) -> None:
    long = text * times
    short = shortened(long)
    assert len(short) <= LONGEST_MESSAGE
    assert (short == long) == (len(long) <= LONGEST_MESSAGE)
    assert long.startswith(short[:100])
    error = ApiError(400, long, param=long)
    assert len(error.encode()) < 2 * 6 * LONGEST_MESSAGE + 200  # JSON may escape each character
