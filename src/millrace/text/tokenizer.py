"""A checkpoint's tokenizer: text to token ids, and each token id to the bytes it stands for.

Only byte-level BPE is known (every Qwen model has it): there a token is a fixed string of bytes,
so that decoding needs no look at its neighbours. Bytes that end in the middle of a character are
handled by `millrace.text.detokenizer`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers

from millrace.errors import CheckpointError, RequestError, is_library_failure
from millrace.text.chat.encoded_turns import TURN_END
from millrace.text.checkpoint.tokenizer_file import read_tokenizer

log = logging.getLogger(__name__)


def _byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte.

    Printable Latin-1 bytes stand for themselves, the others follow from U+0100 on (GPT-2's rule).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + at): byte for at, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


class TokenBytes(dict[int, bytes]):
    """token id -> its bytes, filled in as tokens are met; ids that no token has are empty."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        self[token_id] = found = b"" if token is None else _bytes_of(token)
        return found


def _bytes_of(token: str) -> bytes:
    """Bytes of a vocabulary entry; an entry outside the alphabet (an added token) is plain text."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()


class Tokenizer:
    """Encodes and decodes by one `tokenizer.json`.

    token_bytes: token id -> bytes. special_ids: tokens left out of text unless asked for.
    longest_token: bytes of the longest token, so that a text of n bytes has at least
    n / longest_token tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.token_bytes = TokenBytes(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.longest_token = max(
            (len(_bytes_of(token)) for token in backend.get_vocab()), default=1
        )
        self._turn_end: int | None = backend.token_to_id(TURN_END)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json`; CheckpointError if it is missing or broken.

        One of another kind is replaced by a `NoTokenizer`, with a warning.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a model directory needs tokenizer.json")
        backend = read_tokenizer(path)
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            kind = type(backend.decoder).__name__
            reason = f"{path}: decoder {kind} is not known, ByteLevel is"
            log.warning("%s; prompts and answers are token ids", reason)
            return NoTokenizer(reason)
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in it are taken as such.

        Raises RequestError for a text at which the library fails.
        """
        # As a batch of one: that releases the interpreter, and computes no offsets.
        try:
            (encoding,) = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except (UnicodeError, TypeError):  # half a surrogate pair
            raise
        except BaseException as error:
            if not is_library_failure(error):
                raise
            raise RequestError("the tokenizer cannot encode this text; shorten it") from None
        return list(encoding.ids)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written so, None if there is none."""
        found: int | None = self._backend.token_to_id(text)
        return found

    def cuts_out(self, text: str) -> bool:
        """Whether a token is cut out of every text as it stands, before the rest is encoded."""
        added = self._backend.get_added_tokens_decoder().get(self._backend.token_to_id(text) or 0)
        return (
            added is not None
            and added.content == text
            and not (added.normalized or added.lstrip or added.rstrip or added.single_word)
        )

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that form no character become U+FFFD."""
        return self.token_bytes[token_id].decode(errors="replace")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that form no character become U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        table = self.token_bytes
        return b"".join([table[i] for i in token_ids if i not in skipped]).decode(errors="replace")

    # --- names of transformers' tokenizers ---------------------------------------------------

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Every token as the vocabulary writes it, with its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        """The token that the tokenizer puts before a text; None if it puts none."""
        first = self.encode("")
        return first[0] if first else None

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a chat turn, or else a text; None if neither is known."""
        known = (self.token_id(text) for text in (TURN_END, "<|endoftext|>"))
        return next((token for token in known if token is not None), None)

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self.special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        return [self.token_text(token) for token in self.all_special_ids]

    def convert_ids_to_tokens(self, token_ids: int | Sequence[int]) -> Any:
        """The token of an id as the vocabulary writes it, or those of several."""
        if isinstance(token_ids, int):
            return self._backend.id_to_token(token_ids)
        return [self._backend.id_to_token(token) for token in token_ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token as the vocabulary writes it, or those of several; None if unknown."""
        if isinstance(tokens, str):
            return self.token_id(tokens)
        return [self.token_id(token) for token in tokens]

    def turn_ends(self, token_ids: Sequence[int]) -> list[int]:
        """Positions right after each end of a chat turn and the line break that follows it."""
        if self._turn_end is None:
            return []
        ends = _ends_of(token_ids, self._turn_end)
        return [
            end + 1 if end < len(token_ids) and self.token_bytes[token_ids[end]] == b"\n" else end
            for end in ends
        ]


def _ends_of(token_ids: Sequence[int], token: int) -> list[int]:
    """The positions behind a token; `index` looks at a number in a few nanoseconds."""
    found, start = [], 0
    with suppress(ValueError):
        while True:
            start = token_ids.index(token, start) + 1
            found.append(start)
    return found


class NoTokenizer(Tokenizer):
    """Stands in where there is none: prompts are token ids, and every token's text is empty.

    reason: why there is none.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(tokenizers.Tokenizer(tokenizers.models.BPE()))
        self.reason = reason

    @property
    def bos_token_id(self) -> int | None:
        return None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Refuses every text, with RequestError."""
        raise self.refusal()

    def token_text(self, token_id: int) -> str:
        """The name of a token in logprobs, where it stands for its text."""
        return f"token_id:{token_id}"

    def refusal(self) -> RequestError:
        """Why a text cannot be a prompt, and what can."""
        return RequestError(
            f"texts cannot be encoded here ({self.reason}); send token ids, as the prompt of "
            "/v1/completions",
            param="prompt",
        )
