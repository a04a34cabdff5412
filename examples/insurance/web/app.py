"""The application's requests: log-in and log-out, a question, a document, feedback, figures.

The asker of a request is that of its session. Nothing in a body can say otherwise: a customer's
policy comes from the session, and only operators choose one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from examples.insurance.assistant.answer import Assistant
from examples.insurance.retrieval.access import Access, Asker
from examples.insurance.retrieval.store import Store
from examples.insurance.web.limits import RateLimit
from examples.insurance.web.records import Records
from examples.insurance.web.sessions import SECONDS, Credentials, Session, Sessions

COOKIE = "session"
MAX_BODY = 16 * 1024
MAX_QUESTION = 300
STATIC = Path(__file__).parent / "static"
HEADERS = {
    b"content-security-policy": b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"


@dataclass(slots=True)
class Services:
    """What the requests use. gateway: its URL, for its metrics."""

    assistant: Assistant
    store: Store
    access: Access
    credentials: Credentials
    audit: Records
    feedback: Records
    gateway: str


class Application:
    def __init__(self, services: Services) -> None:
        self._s = services
        self.sessions = Sessions()
        self._questions = RateLimit(rate=0.5, burst=10)
        self._log_ins = RateLimit(rate=0.1, burst=10)

    def asgi(self) -> ASGIApp:
        routes = [
            Route("/", self.page),
            Route("/log-in", self.log_in, methods=["POST"]),
            Route("/log-out", self.log_out, methods=["POST"]),
            Route("/me", self.me),
            Route("/ask", self.ask, methods=["POST"]),
            Route("/document/{name}", self.document),
            Route("/feedback", self.keep_feedback, methods=["POST"]),
            Route("/figures", self.figures),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        handlers: Any = {HTTPException: _refused}
        return Starlette(
            routes=routes, exception_handlers=handlers, middleware=[Middleware(SafeHeaders)]
        )

    # --- who asks ------------------------------------------------------------------------------

    def _session(self, request: Request, change: bool = False) -> Session:
        """change: the request changes something, and must bring the session's token."""
        found = self.sessions.find(request.cookies.get(COOKIE, ""))
        if found is None:
            raise HTTPException(401, "Please log in.")
        if change and request.headers.get("x-csrf-token") != found.csrf:
            raise HTTPException(403, "This form is out of date: reload the page.")
        return found

    async def log_in(self, request: Request) -> Response:
        """{"policy", "code"} of customers, {"password"} of operators."""
        if not self._log_ins.allow(request.client.host if request.client else ""):
            raise HTTPException(429, "Too many log-ins: try again in a minute.")
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise HTTPException(403, "Log in from our own page.")
        body = await _body(request)
        known = self._s.credentials
        asker = (
            known.operator(_text(body, "password"))
            if "password" in body
            else known.customer(_text(body, "policy").strip().upper(), _text(body, "code").strip())
        )
        self._s.audit.write(asker, "log-in" if asker else "log-in refused")
        if asker is None:
            raise HTTPException(403, "Number or code are not right.")
        name, _ = self.sessions.begin(asker)
        response = JSONResponse({"role": asker.role})
        response.set_cookie(
            COOKIE, name, max_age=int(SECONDS), httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return response

    async def log_out(self, request: Request) -> Response:
        session = self._session(request, change=True)
        self.sessions.end(request.cookies[COOKIE])
        self._s.audit.write(session.asker, "log-out")
        return JSONResponse({})

    async def me(self, request: Request) -> Response:
        session = self._session(request)
        return JSONResponse(
            {"role": session.asker.role, "policy": session.asker.policy, "csrf": session.csrf}
        )

    # --- questions -----------------------------------------------------------------------------

    async def ask(self, request: Request) -> Response:
        """{"question"}, of operators with {"policy"}; the answer is a line of JSON an event."""
        session = self._session(request, change=True)
        if not self._questions.allow(session.csrf):
            raise HTTPException(429, "Too many questions: wait a few seconds.")
        body = await _body(request)
        question = _text(body, "question").strip()
        if not 0 < len(question) <= MAX_QUESTION:
            raise HTTPException(422, f"A question has 1 to {MAX_QUESTION} characters.")
        asker = session.asker
        policy = asker.policy or _text(body, "policy").strip().upper()
        return StreamingResponse(
            self._answer(asker, policy, question), media_type="application/x-ndjson"
        )

    async def _answer(self, asker: Asker, policy: str, question: str) -> AsyncIterator[str]:
        shown: list[str] = []
        decided = ""
        try:
            async for event in self._s.assistant.answer(asker, policy, question):
                shown += [source["id"] for source in event.get("sources", ())]
                decided = event.get("decision", {}).get("covered", decided)
                yield json.dumps(event, ensure_ascii=False) + "\n"
        except openai.OpenAIError:
            yield json.dumps({"error": "The assistant does not answer. Please try again."}) + "\n"
        finally:
            self._s.audit.write(asker, "ask", policy=policy, shown=shown, decided=decided)

    async def document(self, request: Request) -> Response:
        """A document's clauses: those that the asker may see; 404 as if it were not, if none."""
        asker = self._session(request).asker
        name = request.path_params["name"]
        chunks = [
            chunk
            for chunk in self._s.store.chunks
            if chunk.document == name and self._s.access.may_see(asker, chunk)
        ]
        if not chunks:
            raise HTTPException(404, "There is no such document.")
        self._s.audit.write(asker, "read", document=name)
        clauses = [{"label": c.label, "text": c.text, "section": c.section} for c in chunks]
        return JSONResponse({"name": name, "kind": chunks[0].kind, "clauses": clauses})

    async def keep_feedback(self, request: Request) -> Response:
        asker = self._session(request, change=True).asker
        body = await _body(request)
        facts = {name: _text(body, name)[:MAX_QUESTION] for name in ("question", "verdict")}
        self._s.feedback.write(asker, "feedback", **facts, useful=body.get("useful") is True)
        return JSONResponse({})

    async def figures(self, request: Request) -> Response:
        """The share of drafts that were accepted, over all requests of the gateway's replicas."""
        self._session(request)
        try:
            async with httpx.AsyncClient(timeout=3) as client:
                text = (await client.get(f"{self._s.gateway}/metrics")).text
        except httpx.HTTPError:
            return JSONResponse({"accepted": None})
        drafted = _metric(text, DRAFTED)
        return JSONResponse({"accepted": _metric(text, ACCEPTED) / drafted if drafted else None})

    async def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "page.html")


class SafeHeaders:
    """Adds HEADERS to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS.items()]
            await send(message)

        await self._app(scope, receive, with_headers)


async def _refused(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)


async def _body(request: Request) -> dict[str, Any]:
    """A JSON object of at most MAX_BODY bytes."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise HTTPException(413, f"A request has at most {MAX_BODY} bytes.")
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise HTTPException(400, "The body must be a JSON object.")
    return found


def _text(body: dict[str, Any], name: str) -> str:
    found = body.get(name, "")
    if not isinstance(found, str):
        raise HTTPException(422, f"{name} must be a text.")
    return found


def _metric(text: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
