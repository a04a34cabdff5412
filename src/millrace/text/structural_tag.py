"""Structural tags: text in which some parts have a structure, as a grammar.

Two shapes are read. The older one has `structures` (each with begin, schema and end) and the
`triggers` that begin them within free text. The newer one has a `format`, a tree of the kinds in
`_KINDS`. Names are those of xgrammar and vLLM. A format becomes rules of llguidance's Lark; the
caller checks whether these compile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from millrace.text.tools.json_schema import schema_limit_error

MAX_PARTS = 500  # parts of a format
_ANY = "/(?s:.*)/"

RuleOf = Callable[[Any], str]


class StructuralTagError(ValueError):
    """A structural tag that cannot be served; the message names the place."""


def structural_tag_rules(
    given: Mapping[str, Any] | str, json_rule: RuleOf, regex_rule: RuleOf, grammar_rule: RuleOf
) -> tuple[str, str]:
    """(the right side of the rule that matches the tag, further rules).

    json_rule, regex_rule, grammar_rule: from a schema, an expression, a grammar to what stands for
    it in Lark. Raises StructuralTagError.
    """
    tag = _decoded(given)
    if "format" in tag:
        form = tag["format"]
    elif "structures" in tag:
        form = _from_older(tag)
    else:
        raise StructuralTagError("it needs format, or structures and triggers")
    builder = _Builder(json_rule, regex_rule, grammar_rule)
    body = builder.part(form, "format" if "format" in tag else "structures", last=True)
    return body, "\n".join([*builder.rules, ""])


def _decoded(given: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise StructuralTagError(f"it is not valid JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise StructuralTagError("it must be a JSON object")
    return given


def _from_older(tag: Mapping[str, Any]) -> dict[str, Any]:
    """The older shape in the newer one's terms."""
    structures = tag["structures"]
    if not isinstance(structures, list):
        raise StructuralTagError("structures must be a list")
    tags = []
    for at, one in enumerate(structures):
        if not isinstance(one, dict):
            raise StructuralTagError(f"structures[{at}] must be an object")
        schema = one.get("schema")
        content = {"type": "json_schema", "json_schema": {} if schema is None else schema}
        tags.append({"begin": one.get("begin"), "content": content, "end": one.get("end", "")})
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


class _Builder:
    """Collects the rules of one format, part by part. place: where a part stands."""

    def __init__(self, json_rule: RuleOf, regex_rule: RuleOf, grammar_rule: RuleOf) -> None:
        self.rules: list[str] = []
        self._json, self._regex, self._grammar = json_rule, regex_rule, grammar_rule
        self._count = 0

    def part(self, form: Any, place: str, last: bool = False, ends: Sequence[str] = ()) -> str:
        """What stands for a part in Lark.

        last: nothing follows it. ends: one of these texts does, and the part's rule takes it in.
        """
        if not isinstance(form, Mapping):
            raise StructuralTagError(f"{place} must be an object")
        kind = form.get("type")
        make = _KINDS.get(kind) if isinstance(kind, str) else None
        if make is None:
            known = ", ".join(_KINDS)
            raise StructuralTagError(f"{place}.type must be one of {known}, got {kind!r}")
        self._count += 1
        if self._count > MAX_PARTS:
            raise StructuralTagError(f"it has more than {MAX_PARTS} parts")
        if kind == "any_text":
            return self._any_text(form, place, last, ends)
        found = make(self, form, place, last and not ends)
        return f"({found}) {_choice(ends)}" if ends and any(ends) else f"({found})"

    def _rule(self, body: str, attribute: str = "") -> str:
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{attribute}: {body}")
        return name

    def _until(self, text: str) -> str:
        """Free text up to and with `text`, which does not occur before."""
        return self._rule(_ANY, f"[suffix={_literal(text)}]")

    def _any_text(
        self, form: Mapping[str, Any], place: str, last: bool, ends: Sequence[str]
    ) -> str:
        if form.get("excludes"):
            raise StructuralTagError(f"{place}.excludes is not supported; leave it out")
        if any(ends):
            return "(" + " | ".join(self._until(end) for end in ends if end) + ")"
        if not last:
            raise StructuralTagError(
                f"{place}: any_text needs an end: make it the content of a tag, or the last part"
            )
        return self._rule(_ANY)

    def _const(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        return _literal(_text(form, "value", place))

    def _schema(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        if form.get("style", "json") != "json":
            raise StructuralTagError(f"{place}.style must be json")
        schema = form.get("json_schema")
        if not isinstance(schema, (dict, bool)):
            raise StructuralTagError(f"{place}.json_schema must be a JSON schema")
        if problem := schema_limit_error(schema):
            raise StructuralTagError(f"{place}.json_schema: {problem}")
        return self._json(schema)

    def _regex_part(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        return self._regex(_text(form, "pattern", place))

    def _grammar_part(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        return self._grammar(_text(form, "grammar", place))

    def _sequence(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        parts = _parts(form, "elements", place)
        return " ".join(
            self.part(part, f"{place}.elements[{at}]", last and at == len(parts) - 1)
            for at, part in enumerate(parts)
        )

    def _alternatives(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        parts = _parts(form, "elements", place)
        return " | ".join(
            self.part(part, f"{place}.elements[{at}]", last) for at, part in enumerate(parts)
        )

    def _repeated(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        sign = {"optional": "?", "star": "*", "plus": "+"}[form["type"]]
        return self.part(form.get("content"), f"{place}.content") + sign

    def _tag(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        return f"{_literal(_begin(form, place))} {self._inside(form, place)}"

    def _inside(self, form: Mapping[str, Any], place: str) -> str:
        """A tag's content and its end."""
        given = form.get("end", "")
        ends = given if isinstance(given, list) else [given]
        if not ends or not all(isinstance(end, str) for end in ends):
            raise StructuralTagError(f"{place}.end must be a text or a list of texts")
        return self.part(form.get("content"), f"{place}.content", ends=ends)

    def _triggered(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        """Free text, in which each trigger begins one of the tags."""
        if form.get("excludes"):
            raise StructuralTagError(f"{place}.excludes is not supported; leave it out")
        if not last:
            raise StructuralTagError(f"{place}: triggered_tags must be the last part")
        tags = _parts(form, "tags", place)
        triggers = form.get("triggers")
        if not isinstance(triggers, list) or not triggers:
            raise StructuralTagError(f"{place}.triggers must be a list of texts that is not empty")
        choices = []
        for at, trigger in enumerate(triggers):
            if not isinstance(trigger, str) or not trigger:
                raise StructuralTagError(f"{place}.triggers[{at}] must be a text")
            rests = self._begun_by(trigger, tags, place)
            choices.append(f"{self._until(trigger)} ({' | '.join(rests)})")
        for at, tag in enumerate(tags):
            if not any(_begin(tag, f"{place}.tags[{at}]").startswith(one) for one in triggers):
                raise StructuralTagError(f"{place}.tags[{at}].begin begins with none of triggers")
        return self._amid_text(form, self._rule(" | ".join(choices)))

    def _begun_by(self, trigger: str, tags: Sequence[Any], place: str) -> list[str]:
        """What may follow a trigger: the rest of each tag that begins with it."""
        rests = []
        for at, tag in enumerate(tags):
            where = f"{place}.tags[{at}]"
            begin = _begin(tag, where)
            if begin.startswith(trigger):
                rest = begin[len(trigger) :]
                rests.append(f"{_literal(rest) if rest else ''} {self._inside(tag, where)}")
        if not rests:
            raise StructuralTagError(f"{place}.triggers: no tag begins with {trigger!r}")
        return rests

    def _amid_text(self, form: Mapping[str, Any], tag: str) -> str:
        least, once = form.get("at_least_one"), form.get("stop_after_first")
        if once:
            return tag if least else f"{tag} | {self._rule(_ANY)}"
        return f"{tag}{'+' if least else '*'} {self._rule(_ANY)}"

    def _separated(self, form: Mapping[str, Any], place: str, last: bool) -> str:
        tags = _parts(form, "tags", place)
        tag = self._rule(
            " | ".join(self._tag(one, f"{place}.tags[{at}]", False) for at, one in enumerate(tags))
        )
        separator = _text(form, "separator", place)
        more = f" ({_literal(separator) if separator else ''} {tag})*"
        found = tag if form.get("stop_after_first") else tag + more
        return found if form.get("at_least_one") else f"({found})?"


_KINDS: Mapping[str, Callable[[_Builder, Mapping[str, Any], str, bool], str]] = {
    "const_string": _Builder._const,
    "json_schema": _Builder._schema,
    "regex": _Builder._regex_part,
    "grammar": _Builder._grammar_part,
    "any_text": _Builder._const,  # `part` makes it: it depends on what follows
    "sequence": _Builder._sequence,
    "or": _Builder._alternatives,
    "optional": _Builder._repeated,
    "star": _Builder._repeated,
    "plus": _Builder._repeated,
    "tag": _Builder._tag,
    "triggered_tags": _Builder._triggered,
    "tags_with_separator": _Builder._separated,
}


def _text(form: Mapping[str, Any], key: str, place: str) -> str:
    value = form.get(key)
    if not isinstance(value, str):
        raise StructuralTagError(f"{place}.{key} must be a text")
    return value


def _begin(tag: Any, place: str) -> str:
    if not isinstance(tag, Mapping):
        raise StructuralTagError(f"{place} must be an object")
    return _text(tag, "begin", place)


def _parts(form: Mapping[str, Any], key: str, place: str) -> list[Any]:
    value = form.get(key)
    if not isinstance(value, list) or not value:
        raise StructuralTagError(f"{place}.{key} must be a list that is not empty")
    return value


def _choice(texts: Sequence[str]) -> str:
    choices = " | ".join(_literal(text) for text in texts if text)
    return f"({choices})" if all(texts) else f"({choices})?"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
