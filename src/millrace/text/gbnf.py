"""EBNF as llama.cpp and xgrammar write it (`root ::= ...`), turned into llguidance's Lark.

llguidance's own converter does the work; here is what it does not take: alternatives that begin on
a new line, and characters by their numbers.
"""

from __future__ import annotations

import re

_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_CONTINUED = re.compile(r"\r?\n[ \t\r\n]*(?=\|)")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_ASCII = 0x80


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar has a rule with `::=`, which Lark does not."""
    return _RULE.search(grammar) is not None


def gbnf_to_lark(grammar: str) -> str:
    """The grammar in Lark, whose first rule is `start`. Raises ValueError that says what is
    wrong."""
    from llguidance.gbnf_to_lark import gbnf_to_lark as convert

    text = _ESCAPE.sub(_plain_character, _CONTINUED.sub(" ", grammar))
    try:
        lark: str = convert(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # the converter has no class of errors for all that it refuses
        raise ValueError(str(error)) from None
    return lark.removeprefix("%llguidance {}").lstrip()


def _plain_character(escape: re.Match[str]) -> str:
    """`\\u4e2d` as the character itself; one that may mean something as `\\x..`."""
    number = int(escape[1] or escape[2] or "0", 16)
    if not (escape[1] or escape[2]) or number > 0x10FFFF or 0xD800 <= number < 0xE000:
        return escape[0]
    return chr(number) if number >= _ASCII else f"\\x{number:02x}"
