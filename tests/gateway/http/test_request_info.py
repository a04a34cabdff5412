"""What is read of requests: the model is found whatever else a body holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.common.http_client import fetch
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import RequestInfo, body_for, read_request_info
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import run

FORM = b"multipart/form-data; boundary=xyz"


def read(body: bytes, path: str = "/v1/completions", kind: bytes = b"") -> RequestInfo:
    headers = [(b"Content-Type", kind)] if kind else []
    return read_request_info(Request(b"POST", path.encode(), "1.1", headers, body, True))


@pytest.mark.parametrize(
    "more",
    [
        {"user": 17},
        {"max_tokens": 5.0},
        {"max_tokens": "many"},
        {"n": [1]},
        {"seed": 2**70},
        {"stream_options": 1},
        {"stream_options": {"include_usage": "yes"}},
        {"service_tier": {}},
        {"resume_token_ids": ["a"]},
        {"tools": 1, "prompt_cache_key": False, "echo": 0},
    ],
)
def test_a_field_of_another_type_costs_that_field_alone(more: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "prompt": "hi", "stream": True, **more}).encode()
    info = read(body)
    assert (info.model, b"".join(info.prompt), info.stream) == ("m", b'"hi"', True)
    for kind in ("other", "vllm", "millrace"):
        assert json.loads(body_for(info, kind))["prompt"] == "hi"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "temperature": NaN}',
        b'{"prompt": "x", "model" : "m", }',
        b'\xef\xbb\xbf{"model":"m"}',
        b'{"prompt": "\xff", "model": "m"}',
        b'{"prompt": "\\ud83d", "model": "m"}',
        b'[{"model": "m"}]',
        b'{"model": "\\u006d"} trailing',
    ],
)
def test_a_body_that_is_no_json_object_may_name_a_model(body: bytes) -> None:
    assert read(body).model == "m"


@pytest.mark.parametrize("path", ["/tokenize", "/v1/embeddings", "/v1/audio/speech", "/pooling"])
def test_every_path_with_a_body_names_its_model(path: str) -> None:
    assert read(b'{"model": "m", "input": 1}', path).model == "m"


@pytest.mark.parametrize(
    ("parts", "model"),
    [
        ([(b'name="file"; filename="a"', b"--xyzzy\r\nname=model"), (b'name="model"', b"m")], "m"),
        ([(b"name=model", b" m ")], "m"),
        ([(b'name="models"', b"no")], None),
        ([(b'name="file"; filename="model"', b"no")], None),
        ([], None),
    ],
)
def test_a_form_names_its_model(parts: list[tuple[bytes, bytes]], model: str | None) -> None:
    body = b"".join(
        b"--xyz\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % part for part in parts
    )
    assert read(body + b"--xyz--\r\n", "/v1/audio/transcriptions", FORM).model == model


@given(body=st.binary(max_size=200), kind=st.sampled_from([b"", FORM, b"multipart/x", b'\xff/;="']))
def test_no_body_is_too_odd_to_read(body: bytes, kind: bytes) -> None:
    read(body, "/v1/completions", kind)
    read(b'{"model": "m", "x": ' + body, "/v1/completions", kind)
    read(b"--xyz" + body + b"\r\n--xyz", "/v1/completions", kind)


def test_requests_go_to_the_replica_of_their_model_or_the_models_are_named() -> None:
    async def scenario() -> None:
        one = await MockReplica(model="llm", behaviour="plain", name="llm").start()
        two = await MockReplica(model="org/whisper", behaviour="plain", name="whisper").start()
        async with gateway(one.url, two.url) as (_, target):
            for body, kind in (
                (b'{"model": "org/whisper", "user": 17, "prompt": "x"}', "application/json"),
                (b'{"model": "org/whisper", "max_tokens": 5.0}', "application/json"),
            ):
                for path in ("/v1/completions", "/v1/audio/speech", "/tokenize"):
                    headers = (("Content-Type", kind),)
                    for _ in range(3):
                        answer = await fetch(
                            target, path, method="POST", body=body, headers=headers
                        )
                        assert answer.headers["x-replica"] == "whisper"
            nameless = await fetch(target, "/tokenize", method="POST", body=b'{"prompt": "x"}')
            assert nameless.status == 404
            assert b"the request names no model; served are: llm, org/whisper" in nameless.body
            card = await fetch(target, "/v1/models/org/whisper")
            assert json.loads(card.body)["id"] == "org/whisper"
            assert json.loads((await fetch(target, "/v1/models/org%2Fwhisper")).body) == json.loads(
                card.body
            )
            none = await fetch(target, "/v1/models/other")
            assert (none.status, b"llm, org/whisper" in none.body) == (404, True)
        await one.stop()
        await two.stop()

    run(scenario())


ID = "resp_0123abcd" + "0" * 32


@pytest.mark.parametrize(
    ("method", "path", "body", "tag"),
    [
        (b"GET", f"/v1/responses/{ID}", None, "0123abcd"),
        (b"GET", f"/v1/responses/{ID}?stream=true", None, "0123abcd"),
        (b"POST", f"/v1/responses/{ID}/cancel", None, "0123abcd"),
        (b"DELETE", "/v1/responses/resp_5", None, ""),
        (b"GET", f"/v1/models/{ID}", None, ""),
        (b"POST", "/v1/responses", {"input": "a", "previous_response_id": ID}, "0123abcd"),
        (b"POST", "/v1/responses/input_tokens", {"previous_response_id": ID}, "0123abcd"),
        (b"POST", "/v1/responses", {"input": "a", "previous_response_id": "resp_é"}, ""),
        (b"POST", "/v1/responses", {"input": f'"id": "{ID}"'}, ""),
        (b"POST", "/v1/chat/completions", {"messages": [], "previous_response_id": ID}, ""),
        (
            b"POST",
            "/v1/responses",
            {"input": [{"role": "user", "id": "x"},
                       {"type": "item_reference", "id": "msg_00ff00ff" + "1" * 24}]},
            "00ff00ff",
        ),
    ],
)  # fmt: skip
def test_the_replica_of_a_stored_response_is_known(
    method: bytes, path: str, body: Any, tag: str
) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    request = Request(method, path.encode(), "1.1", [], data, True)
    assert read_request_info(request).response_tag == tag
