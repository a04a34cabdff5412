"""A question answered: clauses searched for, the model asked, its words streamed and checked.

This module gets an `Asker` of the session and nothing else that says who asks. Whatever the model
says, its sources are those of the asker's search, and a claim is looked up for operators alone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

from openai import AsyncOpenAI

from examples.insurance.assistant import decision as d
from examples.insurance.assistant.prompt import CLAUSES_IN_PROMPT, header, messages
from examples.insurance.documents.insurer import Claim, Insurer
from examples.insurance.documents.wording import PRODUCTS
from examples.insurance.retrieval.access import Asker
from examples.insurance.retrieval.search import Search

MODEL = "millrace-mini"
MAX_TOKENS = 160
CLAIM = re.compile(r"\bCL-\d{4,9}\b")
CLAIM_TOOL = {
    "type": "function",
    "function": {
        "name": "get_claim_status",
        "description": "Say how far a claim has got.",
        "parameters": {
            "type": "object",
            "properties": {"claim_number": {"type": "string", "description": "The claim number."}},
            "required": ["claim_number"],
        },
    },
}

Event = dict[str, Any]


@dataclass(slots=True)
class Figures:
    """What the corner of the page shows. Times in seconds."""

    ttft: float = 0.0
    seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0

    def event(self) -> Event:
        return {"figures": asdict(self)}


class Assistant:
    """client: of the gateway. Claims are kept by number."""

    def __init__(self, insurer: Insurer, search: Search, client: AsyncOpenAI) -> None:
        self._search, self._client = search, client
        self.policies = {policy.number: policy for policy in insurer.policies}
        self.claims: dict[str, Claim] = {c.number: c for p in insurer.policies for c in p.claims}

    async def answer(self, asker: Asker, policy: str, question: str) -> AsyncIterator[Event]:
        """Events: sources, delta (text of the model), decision or said, figures."""
        if asker.role == "operator" and CLAIM.search(question):
            async for event in self._claim(asker, question):
                yield event
            return
        hits = self._search.clauses(asker, policy, question, CLAUSES_IN_PROMPT)
        yield {"sources": [{"id": h.chunk.id, "label": h.chunk.label, "text": h.chunk.text}
                           for h in hits]}  # fmt: skip
        clauses = {hit.chunk.label: hit.chunk.text for hit in hits}
        if not any(hit.on_subject for hit in hits):  # then no clause deals with the matter
            yield {"decision": asdict(d.reference("", None, None, None, 0))}
            yield Figures().event()
            return
        line, parts = self._header(policy), []
        figures = Figures()
        async for text in self._stream(asker, line, clauses, question, figures):
            parts.append(text)
            yield {"delta": text}
        yield {"decision": self._decided("".join(parts), clauses, line)}
        yield figures.event()

    def _header(self, number: str) -> str:
        policy = self.policies[number]
        product, edition = policy.form.split("-")
        return header(number, PRODUCTS[product], int(edition), policy.deductible)

    @staticmethod
    def _decided(text: str, clauses: dict[str, str], line: str) -> Event:
        found = d.parse(text)  # None if it was cut short: better no decision than a guessed one
        return asdict(d.checked(found, clauses, line) if found else d.UNDECIDED)

    async def _stream(
        self, asker: Asker, line: str, clauses: dict[str, str], question: str, figures: Figures
    ) -> AsyncIterator[str]:
        began = time.monotonic()
        create: Any = self._client.chat.completions.create  # its types want literal messages
        stream = await create(
            model=MODEL,
            messages=messages(line, list(clauses.items()), question),
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "decision", "schema": d.schema(list(clauses))},
            },
            extra_body=self._extra(asker),
        )
        async for chunk in stream:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                figures.ttft = figures.ttft or time.monotonic() - began
                yield text
            if chunk.usage:
                details = chunk.usage.prompt_tokens_details
                figures.prompt_tokens = chunk.usage.prompt_tokens
                figures.cached_tokens = (details and details.cached_tokens) or 0
                figures.tokens = chunk.usage.completion_tokens
        figures.seconds = time.monotonic() - began

    @staticmethod
    def _extra(asker: Asker) -> dict[str, Any]:
        """The salt keeps cached prefixes of one asker from another: a hit tells what was asked."""
        salt = f"{asker.role}/{asker.policy}"
        return {"chat_template_kwargs": {"enable_thinking": False}, "cache_salt": salt}

    # --- claims, for operators -----------------------------------------------------------------

    async def _claim(self, asker: Asker, question: str) -> AsyncIterator[Event]:
        """The model calls the tool; what it named is looked up, and the model says the result."""
        said: list[Any] = [{"role": "user", "content": question}]
        first = await self._complete(asker, said)
        calls = first.tool_calls or []
        if not calls:
            yield {"said": first.content or "Please give the number of a claim."}
            return
        call = calls[0]
        found = self.look_up(asker, _argument(call.function.arguments))
        yield {"tool": {"name": call.function.name, "result": found}}
        said += [
            {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": json.dumps(found)},
        ]
        yield {"said": (await self._complete(asker, said)).content or ""}

    def look_up(self, asker: Asker, number: str) -> dict[str, str]:
        """The tool. A customer gets nothing, whatever was called."""
        claim = self.claims.get(number) if asker.role == "operator" else None
        return {"reference": number, "status": claim.status if claim else "not found"}

    async def _complete(self, asker: Asker, said: list[Any]) -> Any:
        create: Any = self._client.chat.completions.create
        answer = await create(
            model=MODEL, messages=said, tools=[CLAIM_TOOL], max_tokens=MAX_TOKENS,
            temperature=0, extra_body=self._extra(asker),
        )  # fmt: skip
        return answer.choices[0].message


def _argument(arguments: str) -> str:
    try:
        found = json.loads(arguments)
    except ValueError:
        return ""
    return str(found.get("claim_number", "")) if isinstance(found, dict) else ""
