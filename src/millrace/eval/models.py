"""Where answers come from: an OpenAI-compatible server over HTTP, or a model in this process.

Both take items and return texts as they are ready. The HTTP client is the standard library's, one
connection a thread: evaluation waits for the model, not for its client, and needs no package.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from millrace.errors import UserError
from millrace.protocol import EngineStats
from millrace.target import parse_base_url
from millrace.tasks import TASKS, Item
from millrace.tasks.chat import call_text

ATTEMPTS = 4  # a server may close an idle connection, or refuse one while its backlog is full
RETRY_SECONDS = 60.0  # how long a loading or full server is asked again


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to item number `index`. error: why there is no text."""

    index: int
    text: str = ""
    seconds: float = 0.0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How answers are generated. max_tokens: None takes the limit of each task."""

    temperature: float = 0.0
    max_tokens: int | None = None
    thinking: bool = True

    def limit(self, item: Item) -> int:
        return self.max_tokens or TASKS[item.task].max_tokens


class Model(Protocol):
    """Anything that answers items."""

    name: str

    def generate(self, items: Sequence[Item], options: GenerationOptions) -> Iterator[Completion]:
        """One completion for each item, in the order in which they are ready."""


# --- an endpoint -------------------------------------------------------------------------------


class Endpoint:
    """An OpenAI-compatible server. model: its name there; None takes the first one it lists."""

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
    ) -> None:
        target = parse_base_url(base_url)
        self._secure, self._host, self._port = target.tls, target.host, target.port
        self.api_path = f"{target.prefix}/v1"
        self._url, self._timeout = base_url, timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.concurrency = concurrency
        self.name = model or self._first_model()

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout)

    def _first_model(self) -> str:
        connection = self.connect()
        try:
            connection.request("GET", f"{self.api_path}/models", headers=self._headers)
            response = connection.getresponse()
            listed = json.loads(response.read())
            return str(listed["data"][0]["id"])
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"--base-url {self._url}: no answer ({error}); start a server there, "
                "for one with `millrace serve`"
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"--base-url {self._url}: GET {self.api_path}/models gave no list of models; "
                "name one with --served-model-name"
            ) from error
        finally:
            connection.close()

    def generate(self, items: Sequence[Item], options: GenerationOptions) -> Iterator[Completion]:
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(items)):
            todo.put(index)
        done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        stop = threading.Event()
        arguments = (items, options, todo, done, stop)
        count = min(self.concurrency, len(items))
        for _ in range(count):
            threading.Thread(target=self._work, args=arguments, daemon=True).start()
        try:
            for _ in items:
                yield done.get()
        finally:
            stop.set()

    def _work(
        self,
        items: Sequence[Item],
        options: GenerationOptions,
        todo: queue.SimpleQueue[int],
        done: queue.SimpleQueue[Completion],
        stop: threading.Event,
    ) -> None:
        """One thread with one connection, until no item is left."""
        connection = self.connect()
        while not stop.is_set():
            try:
                index = todo.get_nowait()
            except queue.Empty:
                break
            began = time.perf_counter()
            try:
                text, tokens = self._post(connection, self._body(items[index], options))
                done.put(Completion(index, text, time.perf_counter() - began, tokens))
            except Exception as error:  # without a completion for every item the caller would wait
                connection.close()  # the next request opens it again
                reason = f"{type(error).__name__}: {error}"
                done.put(Completion(index, seconds=time.perf_counter() - began, error=reason))
        connection.close()

    def _body(self, item: Item, options: GenerationOptions) -> bytes:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(item.messages),
            "temperature": options.temperature,
            "max_tokens": options.limit(item),
        }
        if item.tools:
            body["tools"] = list(item.tools)
        if not options.thinking:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        return json.dumps(body).encode()

    def _post(self, connection: http.client.HTTPConnection, body: bytes) -> tuple[str, int]:
        """One request; retried for a while when the server is loading or full (503, 429)."""
        until = time.monotonic() + RETRY_SECONDS
        while True:
            status, data = self._exchange(connection, body)
            if status not in (429, 503) or time.monotonic() > until:
                break
            time.sleep(0.5)
        if status != 200:
            raise OSError(f"HTTP {status}: {data[:200].decode(errors='replace')}")
        reply = json.loads(data)
        message = reply["choices"][0]["message"]
        return _text_of(message), int((reply.get("usage") or {}).get("completion_tokens", 0))

    def _exchange(self, connection: http.client.HTTPConnection, body: bytes) -> tuple[int, bytes]:
        for attempt in range(ATTEMPTS):
            try:
                connection.request("POST", f"{self.api_path}/chat/completions", body, self._headers)
                response = connection.getresponse()
                break
            except ConnectionError:
                connection.close()
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
        return response.status, response.read()


def _text_of(message: Mapping[str, Any]) -> str:
    """A reply as the model wrote it: the text, then tool calls as the template writes them."""
    text = message.get("content") or ""
    for call in message.get("tool_calls") or ():
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"])
        text += call_text({"function": function})
    return text


# --- in this process -----------------------------------------------------------------------------


class InProcess:
    """A model directory, run in this process through `millrace.LLM`, a slice of items at a time.

    options: keyword arguments of LLM. Slices of twice max_num_seqs keep the batch full and let a
    progress bar advance.
    """

    def __init__(self, directory: str, concurrency: int = 64, **options: Any) -> None:
        from millrace.llm import LLM

        self.name = directory
        self._slice = 2 * concurrency
        self._llm: Any = LLM(model=directory, max_num_seqs=concurrency, **options)

    def stats(self) -> EngineStats:
        """The engine's counters since it started."""
        stats: EngineStats = self._llm.stats()
        return stats

    def close(self) -> None:
        """Free the engine and its memory."""
        self._llm = None

    def generate(self, items: Sequence[Item], options: GenerationOptions) -> Iterator[Completion]:
        from millrace.protocol import SamplingParams

        groups: dict[tuple[int, str], list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault((options.limit(item), json.dumps(item.tools)), []).append(index)
        for (limit, _), indices in groups.items():
            parameters = SamplingParams(temperature=options.temperature, max_tokens=limit)
            for first in range(0, len(indices), self._slice):
                part = indices[first : first + self._slice]
                yield from self._generate_part([items[i] for i in part], part, parameters, options)

    def _generate_part(
        self,
        items: Sequence[Item],
        indices: Sequence[int],
        parameters: Any,
        options: GenerationOptions,
    ) -> Iterator[Completion]:
        variables: dict[str, Any] = {} if options.thinking else {"enable_thinking": False}
        if items[0].tools:
            variables["tools"] = list(items[0].tools)
        began = time.perf_counter()
        messages = [list(item.messages) for item in items]
        outputs = self._llm.chat(
            messages, parameters, use_tqdm=False, chat_template_kwargs=variables
        )
        seconds = time.perf_counter() - began
        for index, output in zip(indices, outputs, strict=True):
            completion = output.outputs[0]
            yield Completion(index, completion.text, seconds, len(completion.token_ids))
