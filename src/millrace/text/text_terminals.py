"""Texts of parameters as terminals: what a schema says of a text that stands bare, or in quotes.

Types, references and combinations are followed; where a text must stand in quotes is told by
`tools.values`. Knows no function and no other type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from millrace.text.grammar import literal, regex_terminal
from millrace.text.tools.call_tags import TAGS
from millrace.text.tools.json_repair import dump
from millrace.text.tools.json_schema import listed, resolve, types_of
from millrace.text.tools.text_patterns import FORMATS, lengths, searched
from millrace.text.tools.values import AMBIGUOUS

_MAX_DEPTH = 16
_ANY = "/(?s:.*)/"
_TAG = "|".join(TAGS).replace("/", r"\/")
_TAGGED = f"/(?s:.*)(?:{_TAG})(?s:.*)/"
# A character in JSON's quotes; of the ways to write one those that keep a tag as it is.
_UNIT = r'(?:[^"\\\x00-\x1f]|\\["\\\/bfnrt]|\\u00[01][0-9a-f])'
_UNESCAPED = r'/[^"\\\x00-\x1f]*/'


class UnboundError(Exception):
    """A part of a schema that no grammar binds here. The message says which and why."""


class _Texts(NamedTuple):
    """Texts that a schema allows, as a terminal. quoted: the same as they stand between JSON's
    quotes; None if only those are known that stand there as they are. bounds: (least, most)
    characters, where nothing else is bound.
    """

    terminal: str
    quoted: str | None
    bounds: tuple[int, int | None] | None = None

    @property
    def in_quotes(self) -> str:
        return self.quoted or f"({self.terminal} & {_UNESCAPED})"


class Terminals:
    """The terminals of a grammar, each told once: most parameters have the same ones."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def name(self, body: str) -> str:
        """The name of a terminal with that right side."""
        return self._names.setdefault(body, f"TERMINAL_{len(self._names)}")

    def source(self) -> str:
        return "".join(f"{name}: {body}\n" for body, name in self._names.items())


class TextTerminals:
    """The terminals of texts. root: what references point into. exact: raise UnboundError for what
    cannot be bound; else that binds nothing.
    """

    def __init__(self, root: Any, exact: bool, terminals: Terminals) -> None:
        self._root = root
        self._exact = exact
        self._terminals = terminals

    def of(self, schema: Any, read_as: frozenset[str], digits: bool) -> list[str]:
        """Terminals of the texts, bare and in quotes. digits: numbers are JSON of the matcher, with
        which a bare text must not begin then.
        """
        texts = self._texts(schema, 0)
        if texts is None:
            return []
        ambiguous = "|".join(AMBIGUOUS[kind] for kind in sorted(read_as & AMBIGUOUS.keys()))
        tagged = self._terminals.name(_TAGGED)
        bare = [texts.terminal, f"~{tagged}"]
        if ambiguous:
            bare.append(f'~/["\\\\]*(?:{ambiguous})["\\\\]*/')
        if digits:
            bare.append("~/-?[0-9](?s:.*)/")
        found = [f"({' & '.join(bare)})"]
        needy = tagged
        if ambiguous:
            needy += f' | /(?:\\\\["\\\\])*(?:{ambiguous})(?:\\\\["\\\\])*/'
        quote = literal('"')
        found.append(f"({quote} ({texts.in_quotes} & ({needy})) {quote})")
        return found

    def _texts(self, schema: Any, depth: int) -> _Texts | None:
        """The texts that a schema allows; None if there are none."""
        if schema is False:
            return None
        if not isinstance(schema, dict):
            return _bounded(0, None)
        if depth > _MAX_DEPTH:
            raise UnboundError("its references lead in a circle")
        if "string" not in types_of(schema, self._root):
            return None
        found: list[_Texts | None] = [self._own_texts(schema)]
        if isinstance(schema.get("$ref"), str):
            found.append(self._texts(resolve(schema["$ref"], self._root), depth + 1))
        found += [self._texts(part, depth + 1) for part in listed(schema, "allOf")]
        for key in ("anyOf", "oneOf"):
            options = [self._texts(part, depth + 1) for part in listed(schema, key)]
            if options:
                found.append(_any_of([one for one in options if one is not None]))
        return _all_of(found)

    def _own_texts(self, schema: dict[str, Any]) -> _Texts:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        found = [_bounded(least, most)]
        texts = schema.get("enum") if "const" not in schema else [schema["const"]]
        if isinstance(texts, list):
            found.append(_listed([one for one in texts if isinstance(one, str)]))
        if isinstance(schema.get("pattern"), str):
            found.append(_Texts(self.pattern(schema["pattern"]), None))
        form = schema.get("format")
        if form in FORMATS:
            found.append(_Texts(regex_terminal(FORMATS[form]), None))
        elif form not in (None, "unknown") and self._exact:
            raise UnboundError(f"Unknown format: {form}")
        return _all_of(found) or found[0]

    def pattern(self, pattern: str) -> str:
        """The terminal of texts in which a schema's pattern finds something."""
        found = searched(pattern)
        if found is None and self._exact:
            raise UnboundError(f"the pattern {pattern!r} cannot be bound")
        return _ANY if found is None else regex_terminal(found)


def _intersection(terminals: Sequence[str]) -> str:
    kept = list(dict.fromkeys(one for one in terminals if one != _ANY))
    return kept[0] if len(kept) == 1 else f"({' & '.join(kept)})" if kept else _ANY


def _bounded(least: int, most: int | None) -> _Texts:
    free = least == 0 and most is None
    terminal = _ANY if free else regex_terminal(lengths(least, most))
    return _Texts(terminal, f"/{_UNIT}{{{least},{'' if most is None else most}}}/", (least, most))


def _listed(texts: Sequence[str]) -> _Texts:
    bare = " | ".join(map(literal, texts))
    quoted = " | ".join(literal(dump(text)[1:-1]) for text in texts)
    return _Texts(f"({bare})", f"({quoted})")


def _all_of(texts: Sequence[_Texts | None]) -> _Texts | None:
    found = [one for one in texts if one is not None]
    if len(found) < len(texts):
        return None
    kept = [one for one in found if one.terminal != _ANY] or found[:1]
    if len(kept) == 1:
        return kept[0]
    bounds = [one.bounds for one in kept if one.bounds is not None]
    if len(bounds) == len(kept):
        mosts = [most for _, most in bounds if most is not None]
        return _bounded(max(least for least, _ in bounds), min(mosts, default=None))
    return _Texts(_intersection([one.terminal for one in kept]), None)


def _any_of(texts: Sequence[_Texts]) -> _Texts | None:
    if len(texts) < 2:
        return texts[0] if texts else None
    terminals = " | ".join(one.terminal for one in texts)
    return _Texts(f"({terminals})", f"({' | '.join(one.in_quotes for one in texts)})")
