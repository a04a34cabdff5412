"""The hashes by which a gateway and a replica name the same prefix of a prompt.

A block is 256 bytes of the prompt's JSON, as the client wrote it; where several fields make the
prompt, one stands behind the other. The hash of a block covers all blocks before it, so two prompts
share a hash as far as they begin alike. It is a checksum, which goes on from block to block for
next to nothing; prompts that collide, even on purpose, cost a missed hint, never an answer. Prompts
under different cache salts share no hash. Who holds which prefix is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated
from zlib import crc32

import msgspec

BLOCK = 256
MAX_BLOCKS = 64
SALT_HEADER = "x-cache-salt"  # by which a gateway says whose request it is
# By path: the fields of a request for text that make its prompt, in the order in which it is read.
PROMPT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "/v1/completions": ("prompt",),
    "/v1/chat/completions": ("messages",),
    "/v1/responses": ("instructions", "input"),
    "/v1/messages": ("system", "messages"),
}

Hash = Annotated[int, msgspec.Meta(ge=0, le=(BLOCK * MAX_BLOCKS + 1 << 32) - 1)]


class PrefixReport(msgspec.Struct, frozen=True):
    """What a replica says of the prefixes it holds, to one who names a cursor.

    epoch: another one once its cache has been lost. since: the cursor to name next. hashes: of
    what came after the cursor named, oldest first; maybe not all.
    """

    epoch: str
    since: Annotated[str, msgspec.Meta(pattern="^[0-9a-z.]{1,64}$")]  # it goes into a URL
    hashes: list[Hash]


def key_salt(key: bytes) -> str:
    """The salt of those who use an API key: 32 hexadecimal digits, which do not tell the key."""
    return sha256(b"millrace cache salt\0" + key).hexdigest()[:32]


def combined_salt(key: str, gateway: str, own: str) -> str:
    """One salt for the salts of an API key, of a gateway and of a request; empty if all are.

    key and gateway hold letters and digits only, so that no two combinations are the same.
    """
    return f"{key}.{gateway}/{own}" if key or gateway or own else ""


def hash_chain(prompt: bytes, salt: str = "") -> list[int]:
    """One hash (its depth, and 32 bits) for each whole block of the prompt's beginning, at most
    MAX_BLOCKS.

    The last, partial block of a short prompt counts as one, so that repeats of it are found.
    """
    chain, so_far = [], crc32(salt.encode())
    end = min(len(prompt), BLOCK * MAX_BLOCKS)
    for start in range(0, max(1, end - end % BLOCK), BLOCK):
        so_far = crc32(prompt[start : start + BLOCK], so_far)
        chain.append(start + BLOCK << 32 | so_far)
    return chain
