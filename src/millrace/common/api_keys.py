"""API keys: which ones were configured, and whether a request brings one of them.

A key that is empty, or nothing but spaces, is refused when it is configured: it comes from a
variable that was not set, and would open the door or lock it. Who may do what is not known here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from millrace.errors import ConfigError


class ApiKeys:
    """Keys of which a request must bring one."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        """Whether there is a key at all."""
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Whether this is one of the keys.

        Every key is compared, in constant time: how long it takes says nothing about any of them.
        """
        given = _digest(key)
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def presented_key(authorization: bytes, x_api_key: bytes) -> bytes:
    """The key in a request's headers: `Authorization: Bearer KEY`, else `x-api-key: KEY`.

    Empty if there is none. Headers that are not there are given as b"".
    """
    scheme, _, key = authorization.partition(b" ")
    return (key if scheme.lower() == b"bearer" else x_api_key).strip()


def checked_key(key: str, source: str) -> str:
    """A configured key without spaces around it. source: the flag or variable that it comes from.

    Raises ConfigError if nothing is left, or if no header could carry it.
    """
    stripped = key.strip()
    if not stripped:
        raise ConfigError(
            f"{source} is empty; give it a key, or leave it out where no key is wanted"
        )
    if not stripped.isprintable():
        raise ConfigError(f"{source}: a key has no line breaks or control characters")
    return stripped


def configured_keys(
    given: Sequence[str],
    flag: str,
    variables: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> list[str]:
    """The keys of a flag; without one, those of the environment variables that are set.

    Raises ConfigError for an empty one, which names the flag or the variable.
    """
    if given:
        return [checked_key(key, flag) for key in given]
    there = [name for name in variables if name in environment]
    return [checked_key(environment[name], f"the variable {name}") for name in there]


def keys_of_file(path: str, flag: str) -> list[str]:
    """The keys of a file, one a line; empty lines are skipped. Raises ConfigError without any."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{flag} {path}: {reason}") from None
    keys = [checked_key(line, f"{flag} {path}") for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"{flag} {path}: it holds no key; write one a line")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
