"""The hashes by which a gateway and a replica name the same prefix of a prompt.

A block is 256 bytes of the prompt's JSON, as the client wrote it, but without what clients change
from request to request; where several fields make the prompt, one stands behind the other. Behind
16 KiB blocks grow with their place, so that long conversations, which begin with one system prompt,
are told apart by few hashes. The hash of a block covers all blocks before it, so two prompts share
a hash as far as they begin alike. It is a checksum, which goes on from block to block for
next to nothing; prompts that collide, even on purpose, cost a missed hint, never an answer. Prompts
under different cache salts share no hash. Who holds which prefix is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Annotated
from zlib import crc32

import msgspec

BLOCK = 256
SMALL_BLOCKS = 64  # of BLOCK bytes; those behind are a sixteenth of what lies before them
MOST_BYTES = 4 << 20  # of a prompt that are hashed
SALT_HEADER = "x-cache-salt"  # by which a gateway says whose request it is
# By path: the fields of a request for text that make its prompt, in the order in which it is read.
PROMPT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "/v1/completions": ("prompt",),
    "/v1/chat/completions": ("messages",),
    "/v1/responses": ("instructions", "input"),
    "/v1/messages": ("system", "messages"),
}

Hash = Annotated[int, msgspec.Meta(ge=0, le=(MOST_BYTES + BLOCK << 32) - 1)]


class PrefixReport(msgspec.Struct, frozen=True):
    """What a replica says of the prefixes it holds, to one who names a cursor.

    epoch: another one once its cache has been lost. since: the cursor to name next. hashes: of
    what came after the cursor named, oldest first; maybe not all. host, disk, gone: of those that
    a replica has told of before, what is no longer on its device: it is in the host's memory, in
    files, or nowhere.
    """

    epoch: str
    since: Annotated[str, msgspec.Meta(pattern="^[0-9a-z.]{1,64}$")]  # it goes into a URL
    hashes: list[Hash]
    host: list[Hash] = []
    disk: list[Hash] = []
    gone: list[Hash] = []


def key_salt(key: bytes) -> str:
    """The salt of those who use an API key: 32 hexadecimal digits, which do not tell the key."""
    return sha256(b"millrace cache salt\0" + key).hexdigest()[:32]


def combined_salt(key: str, gateway: str, own: str) -> str:
    """One salt for the salts of an API key, of a gateway and of a request; empty if all are.

    key and gateway hold letters and digits only, so that no two combinations are the same.
    """
    return f"{key}.{gateway}/{own}" if key or gateway or own else ""


def _block_ends() -> tuple[int, ...]:
    ends = [BLOCK * (number + 1) for number in range(SMALL_BLOCKS)]
    while ends[-1] < MOST_BYTES:
        ends.append(ends[-1] + ends[-1] // (SMALL_BLOCKS // 4 * BLOCK) * BLOCK)
    return tuple(end for end in ends if end <= MOST_BYTES)


_ENDS = _block_ends()
MAX_BLOCKS = len(_ENDS)


def hash_chain(prompt: bytes, salt: str = "") -> list[int]:
    """One hash (its depth in bytes, and 32 bits) for each whole block of the prompt's beginning, at
    most MAX_BLOCKS.

    The only block of a short prompt may be unfinished, so that repeats of it are found.
    """
    prompt = without_changing_parts(prompt[:MOST_BYTES])
    chain, so_far, start = list[int](), crc32(salt.encode()), 0
    for end in _ENDS:
        if end > len(prompt) and chain:
            break
        so_far = crc32(prompt[start:end], so_far)
        chain.append(end << 32 | so_far)
        start = end
    return chain


def hash_pieces(pieces: Sequence[msgspec.Raw], salt: str = "") -> list[int]:
    """The same of a prompt in pieces, which are not copied as a whole."""
    return hash_chain(b"".join(memoryview(piece)[:MOST_BYTES] for piece in pieces), salt)


def depth_of(hash: int) -> int:
    """The bytes of a prompt that a hash covers."""
    return hash >> 32


# --- what changes from request to request --------------------------------------------------------

# A line that Claude Code puts before its system prompt, with a fresh number in each request. In
# JSON it ends with the text or with an escaped line break.
_CLIENT_LINE = re.compile(rb'x-anthropic-[a-z-]+:[^"\\]*(?:\\n)?')
_MARK = b'"cache_control"'  # it stands at the newest messages, and is gone a turn later
_MARK_VALUE = re.compile(rb"\s*:\s*(?:\{[^{}]*\}|null)")
_FIRST = 2048  # bytes in which a client's line begins


def without_changing_parts(prompt: bytes) -> bytes:
    """The JSON of a prompt without what says nothing of it and changes with each request."""
    if b"x-anthropic-" in prompt[:_FIRST]:
        prompt = _CLIENT_LINE.sub(b"", prompt[:_FIRST]) + prompt[_FIRST:]
    return _without_marks(prompt) if _MARK in prompt else prompt


def _without_marks(prompt: bytes) -> bytes:
    kept, start = [], 0
    while (at := prompt.find(_MARK, start)) >= 0:
        value = _MARK_VALUE.match(prompt, at + len(_MARK))
        if value is None:  # no key of an object
            kept.append(prompt[start : at + len(_MARK)])
            start = at + len(_MARK)
            continue
        before = prompt[start:at].rstrip()
        end = value.end()
        if before.endswith(b","):
            before = before[:-1]
        elif prompt[end : end + 1] == b",":
            end += 1
        kept.append(before)
        start = end
    return b"".join([*kept, prompt[start:]])
