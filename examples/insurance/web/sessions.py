"""Log-ins and sessions. The role of a session is decided here and kept on the server.

A cookie holds a random name of a session and nothing else. Every session has a token of its own
that a form or a script of our page must send with each change (CSRF).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from examples.insurance.retrieval.access import Asker

SECONDS = 8 * 3600.0
MOST = 10_000


@dataclass(frozen=True, slots=True)
class Session:
    asker: Asker
    csrf: str
    until: float


class Sessions:
    """At most MOST: the oldest goes first."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Session] = OrderedDict()

    def begin(self, asker: Asker) -> tuple[str, Session]:
        name = secrets.token_urlsafe(32)
        made = Session(asker, secrets.token_urlsafe(32), time.monotonic() + SECONDS)
        self._known[name] = made
        if len(self._known) > MOST:
            self._known.popitem(last=False)
        return name, made

    def find(self, name: str) -> Session | None:
        found = self._known.get(name)
        if found and found.until < time.monotonic():
            self.end(name)
            return None
        return found

    def end(self, name: str) -> None:
        self._known.pop(name, None)


class Credentials:
    """Who may log in. key: of the installation; a policy's code follows from it."""

    def __init__(self, policies: frozenset[str], key: bytes, operator_password: str) -> None:
        self._policies, self._key, self._password = policies, key, operator_password

    def code(self, policy: str) -> str:
        """The code in the letter that came with the policy."""
        return hmac.new(self._key, policy.encode(), hashlib.sha256).hexdigest()[:10]

    def customer(self, policy: str, code: str) -> Asker | None:
        right = hmac.compare_digest(self.code(policy).encode(), code.encode())
        return Asker("customer", policy) if right and policy in self._policies else None

    def operator(self, password: str) -> Asker | None:
        right = hmac.compare_digest(self._password.encode(), password.encode())
        return Asker("operator") if right else None
