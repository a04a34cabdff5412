"""Documents cut at their clauses, for a search that answers with a clause and not with a page.

A chunk knows whose it is and who may read it; that is decided here, once, by the kind of its
document. A chunk of an endorsement also knows which clause it replaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import msgspec

from examples.insurance.documents.writing import INTERNAL, Document

_RUNNING_HEAD = re.compile(r"^=== .* ===\n?", re.MULTILINE)
_HYPHEN = re.compile(r"(?<=[a-z])-\n(?=[a-z])")
_MISREAD = re.compile(r"(?<=[a-z])[10]|[10](?=[a-z])")
_CLAUSE = re.compile(r"(\d+\.\d+|[A-Z]\d+) (?=\S)")
_SECTION = re.compile(r"\d+ ([A-Z][a-z ]+)$")
_REPLACES = re.compile(r"Clause (\S+) is deleted and replaced by:$")


class Chunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """One clause. id: its address, for links. policy, form: as of its document.

    internal: for operators only. replaces: the label of the clause of the form that it ends.
    """

    id: str
    document: str
    kind: str
    label: str
    text: str
    section: str = ""
    policy: str = ""
    form: str = ""
    internal: bool = False
    replaces: str = ""


def cleaned(text: str) -> str:
    """A scan's text without its running heads, broken words, and digits within words."""
    text = _HYPHEN.sub("", _RUNNING_HEAD.sub("", text))
    return _MISREAD.sub(lambda digit: "l" if digit[0] == "1" else "o", text)


def chunks_of(document: Document) -> Iterator[Chunk]:
    """The clauses of a document; lines before the first, such as its title, belong to none."""
    section = replaces = label = ""
    lines: list[str] = []

    def made() -> Iterator[Chunk]:
        if label:
            yield Chunk(
                id=f"{document.name}#{label}",
                document=document.name,
                kind=document.kind,
                label=label,
                text=" ".join(lines),
                section=section,
                policy=document.policy,
                form=document.form,
                internal=document.kind in INTERNAL,
                replaces=replaces,
            )

    announced = ""
    for line in cleaned(document.text).split("\n"):
        line = line.strip()
        if found := _CLAUSE.match(line):
            yield from made()
            label, lines, replaces, announced = found[1], [line[found.end() :]], announced, ""
        elif found := _REPLACES.match(line):
            yield from made()
            label, announced = "", found[1]
        elif found := _SECTION.match(line):
            yield from made()
            label, section = "", found[1]
        elif line and label:
            lines.append(line)
    yield from made()


def all_chunks(documents: Iterable[Document]) -> list[Chunk]:
    return [chunk for document in documents for chunk in chunks_of(document)]
