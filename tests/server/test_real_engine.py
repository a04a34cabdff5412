"""`millrace serve` whole: the real engine, a tiny random model, HTTP."""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from millrace import LLM, SamplingParams
from tests.support.live_server import LiveServer, started, wait_for

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 16 << 20,
}
MAX_PROMPTS = ["hello", "Wer reitet", "x", "spät durch Nacht und Wind? 🦊", "a b c d", "END"]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
EXTRA = {"ignore_eos": True, "return_token_ids": True}


# That drafts change no answer of a server is shown by test_crossed as well.
@pytest.fixture(scope="module", params=["plain", pytest.param("mtp", marks=pytest.mark.sweep)])
def server(
    small_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[LiveServer]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    if request.param == "mtp":
        flags.append('--speculative-config={"method": "mtp", "num_speculative_tokens": 2}')
    command = [sys.executable, "-m", "millrace.cli", "serve", str(small_model), "--port=0", *flags]
    log = tmp_path_factory.mktemp("real") / "log"
    with started([*command, "--served-model-name=small"], log) as running:
        running.wait_ready(120)
        yield running


@pytest.fixture(scope="module")
def expected(small_model: Path) -> list[list[int]]:
    """Greedy tokens of every prompt, from the engine in this process."""
    import torch

    torch.set_num_threads(1)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(str(small_model), **OPTIONS) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(MAX_PROMPTS, params)]


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_the_server_says_what_the_library_says(
    client: openai.OpenAI, expected: list[list[int]]
) -> None:
    create: Any = client.completions.create
    batch = create(model="small", prompt=MAX_PROMPTS, extra_body=EXTRA, **GREEDY)
    assert [choice.token_ids for choice in batch.choices] == expected


def test_streams_side_by_side_say_it_too(client: openai.OpenAI, expected: list[list[int]]) -> None:
    create: Any = client.completions.create

    def stream(prompt: str) -> list[int]:
        chunks = create(model="small", prompt=prompt, extra_body=EXTRA, stream=True, **GREEDY)
        return [i for chunk in chunks for i in chunk.choices[0].token_ids]

    with concurrent.futures.ThreadPoolExecutor(len(MAX_PROMPTS)) as pool:
        assert list(pool.map(stream, MAX_PROMPTS)) == expected


def test_a_conversation_finds_its_first_turn_in_the_cache(client: openai.OpenAI) -> None:
    chat: list[Any] = [{"role": "user", "content": "one " * 12}]
    create: Any = client.chat.completions.create
    for _ in range(3):
        answer = create(model="small", messages=chat, extra_body=EXTRA, **GREEDY)
        chat += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "and?"},
        ]
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_every_token_of_a_prompt_is_read_written_or_neither(server: LiveServer) -> None:
    chat: list[Any] = [{"role": "user", "content": "two " * 12}]
    for turn in range(3):
        body = {"model": "small", "messages": chat, "max_tokens": 8, "temperature": 0}
        counted = httpx.post(f"{server.url}/v1/messages/count_tokens", json=body, timeout=30)
        answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=30).json()
        usage = answer["usage"]
        read, written = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
        assert usage["input_tokens"] + read + written == counted.json()["input_tokens"]
        assert usage["input_tokens"] == 0  # what is computed stays
        assert (read > 0) == (turn > 0)
        chat += [
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": "and?"},
        ]


def test_leaving_frees_the_engine(server: LiveServer) -> None:
    body = {"prompt": "hello", "max_tokens": 240, "ignore_eos": True, "stream": True}
    for _ in range(8):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
    wait_for(lambda: server.open_in_engine() == 0, 10)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -(2**63)])
def test_a_seed_repeats_its_answer(client: openai.OpenAI, seed: int) -> None:
    create: Any = client.completions.create
    sampled = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 8, "seed": seed}
    extra = {**EXTRA, "top_k": 50}
    answers = [create(model="small", prompt="hi", extra_body=extra, **sampled) for _ in range(2)]
    assert answers[0].choices[0].token_ids == answers[1].choices[0].token_ids


def test_extreme_but_valid_parameters_are_served(server: LiveServer) -> None:
    for fields in (
        {"temperature": 1e-30},
        {"temperature": 100},
        {"top_p": 1e-30},
        {"top_k": 1},
        {"stop_token_ids": list(range(8))},
        {"stop": ["\n" * 500, "é"]},
    ):
        body = {"prompt": "hello", "max_tokens": 4, **fields}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text


def test_the_metrics_are_the_engines(server: LiveServer) -> None:
    assert server.metric("vllm:generation_tokens_total") > 0
    assert 0 <= server.metric("vllm:kv_cache_usage_perc") < 1
    assert server.metric("millrace:steps_total") > 0
    waited = server.metric("vllm:request_queue_time_seconds_count")
    assert waited == server.metric("vllm:time_to_first_token_seconds_count") > 0
    assert server.metric("millrace:request_queue_time_seconds_sum") < 60


def test_a_wrong_option_ends_with_one_line_of_the_engine(small_model: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "millrace.cli", "serve", str(small_model), "--port=0",
        "--max-model-len=100000000",
    ]  # fmt: skip
    with started(command, tmp_path / "log") as server:
        assert server.process.wait(60) == 2
        *before, line = server.log.splitlines()
        assert all(" INFO " in one for one in before)  # what was begun: no traceback
        assert line.startswith("millrace serve: max_model_len 100000000 is beyond")


def test_a_server_without_a_tokenizer_takes_token_ids(small_model: Path, tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "millrace", "serve", str(small_model), "--port=0", *flags]
    with started([*command, "--skip-tokenizer-init"], tmp_path / "log") as running:
        running.wait_ready(120)
        assert '"prompt":[1,2,3],"return_token_ids":true' in running.log

        def post(path: str, **body: Any) -> Any:
            return httpx.post(f"{running.url}/v1/{path}", json=body, timeout=60).json()

        answer = post("completions", prompt=[1, 2, 3], max_tokens=4, **EXTRA, logprobs=2)
        (choice,) = answer["choices"]
        assert (choice["text"], len(choice["token_ids"])) == ("", 4)
        assert choice["logprobs"]["tokens"] == [f"token_id:{t}" for t in choice["token_ids"]]
        assert "send token ids" in post("completions", prompt="hello")["error"]["message"]
        hello = [{"role": "user", "content": "hello"}]
        assert "send token ids" in post("chat/completions", messages=hello)["error"]["message"]
        bound = {"structured_outputs": {"regex": "a"}}
        refused = post("completions", prompt=[1], **bound)["error"]["message"]
        assert refused == "structured outputs need a tokenizer, which was not loaded"
