"""One rule for the URL of a server, wherever it is given: `/v1` at its end may be there or not."""

from __future__ import annotations

import pytest

from millrace.bench.flags.structs import ServeFlags
from millrace.bench.runs.options_from_flags import target_of
from millrace.chat.client import Client
from millrace.common.http_client import parse_base_url
from millrace.eval.models import Endpoint
from millrace.gateway.health.discovery import parse_spec

FORMS = ["127.0.0.1:81", "http://127.0.0.1:81", "http://127.0.0.1:81/", "http://127.0.0.1:81/v1/"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_server(form: str) -> None:
    assert str(parse_base_url(form)) == "http://127.0.0.1:81"


def test_other_paths_stay() -> None:
    assert str(parse_base_url("https://a/models/v1")) == "https://a:443/models"
    assert str(parse_base_url("https://a/v1beta")) == "https://a:443/v1beta"


@pytest.mark.parametrize("form", FORMS)
def test_bench_chat_eval_and_gateway_take_it(form: str) -> None:
    server = parse_base_url(FORMS[0])
    assert Client(form).target == server
    assert target_of(ServeFlags(base_url=form)) == server
    assert parse_spec([form], "flags", "--worker-urls").target == server
    endpoint = Endpoint(form, "m")
    assert (endpoint.connect().host, endpoint.connect().port) == ("127.0.0.1", 81)
    assert endpoint.api_path == "/v1"
