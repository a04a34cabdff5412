"""Who a request comes from: the check of its API key, and what follows from the key.

It knows no endpoint. The middleware asks it before the application runs, and endpoints read the
result with `client_of`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from starlette.types import Scope

from millrace.common.api_errors import no_access
from millrace.common.api_keys import ApiKeys, presented_key
from millrace.common.prefix_hash import key_salt
from millrace.dashboard.files import PATHS as PAGES

# What answers without a key: what says nothing but that there is a server, and how it fares.
OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version", "/openapi.json", *PAGES})
_CLIENT = "millrace.client"


class Client(NamedTuple):
    """What is known of who sent a request. salt: of its API key, empty where keys share cached
    prefixes. reads_prefixes: it may ask which prefixes are cached. owner: of the responses that it
    may use; empty where there are no keys."""

    salt: str = ""
    reads_prefixes: bool = True
    owner: str = ""


class Access:
    """The keys of which a request must bring one; without any, every request may pass.

    gateway_key: a gateway's; where there are keys, only it may ask which prefixes are cached.
    salt_by_key: requests of different keys share no cached prefixes. admin_key: what requests for
    `admin_paths` bring instead, where there is one.
    """

    def __init__(
        self,
        keys: Sequence[str] = (),
        gateway_key: str | None = None,
        *,
        salt_by_key: bool = False,
        admin_key: str | None = None,
        admin_paths: Collection[str] = (),
    ) -> None:
        self._admin_keys = ApiKeys([] if admin_key is None else [admin_key])
        self._admin_paths = frozenset(admin_paths)
        gateway_keys = [] if gateway_key is None else [gateway_key]
        self._keys = ApiKeys([*keys, *gateway_keys])
        self._gateway_keys = ApiKeys(gateway_keys)
        self._salt_by_key = salt_by_key

    def admit(self, scope: Scope) -> None:
        """Note who sent the request. Raises ApiError (401) unless it may pass."""
        for_admin = self._admin_keys and scope["path"] in self._admin_paths
        if not (self._keys or for_admin) or scope["path"] in OPEN_PATHS:
            return
        headers = dict(scope["headers"])
        key = presented_key(headers.get(b"authorization", b""), headers.get(b"x-api-key", b""))
        if for_admin:
            if not self._admin_keys.accept(key):
                raise no_access(given=bool(key))
            return
        if not self._keys.accept(key):
            raise no_access(given=bool(key))
        from_gateway = self._gateway_keys.accept(key)
        salted = self._salt_by_key and not from_gateway  # a gateway sends salts of its own
        own = key_salt(key)
        scope[_CLIENT] = Client(own if salted else "", from_gateway, own)


def client_of(scope: Scope) -> Client:
    """Who sent a request that has been admitted."""
    client: Client = scope.get(_CLIENT) or Client()
    return client
