"""Degrees of reasoning effort: which words a chat template knows, and the nearest to a client's.

OpenAI's, Anthropic's and other clients' words form one scale. Templates know some of them, and
refuse the others, or take them for their default without a word.
"""

from __future__ import annotations

from collections.abc import Callable

from millrace.errors import RequestError

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
VARIABLE = "reasoning_effort"
_UNKNOWN = "an-effort-that-nobody-knows"


def known_efforts(source: str, render: Callable[[str], str]) -> tuple[str, ...] | None:
    """The words that a template knows, in the order of the scale; empty: it takes any word; None:
    it has no such variable.

    render: a short chat with a word; raises RequestError if the template refuses it.
    """
    if VARIABLE not in source:
        return None
    unknown = _rendered(render, _UNKNOWN)
    known = []
    for word in EFFORTS:
        text = _rendered(render, word)
        named = f"'{word}'" in source or f'"{word}"' in source
        if text is not None and (text != unknown or named):
            known.append(word)
    everything = unknown is not None and unknown == _rendered(render, _UNKNOWN[::-1])
    return tuple(known) if known and (unknown is None or everything) else ()


def _rendered(render: Callable[[str], str], word: str) -> str | None:
    try:
        return render(word)
    except RequestError:
        return None


def nearest_effort(wanted: str, known: tuple[str, ...]) -> str:
    """The word of a template for a client's: itself, or the nearest of the scale, of two the higher
    one. Raises RequestError for a word that is not of the scale."""
    if not known or wanted in known:
        return wanted
    if wanted not in EFFORTS:
        words = ", ".join(EFFORTS)
        raise RequestError(f"{VARIABLE} must be one of {words}, got {wanted!r:.60}", param=VARIABLE)
    place = EFFORTS.index(wanted)
    return min(known, key=lambda word: (abs(EFFORTS.index(word) - place), -EFFORTS.index(word)))
