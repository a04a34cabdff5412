"""Bare texts as expressions of the matcher: patterns, lengths and formats of JSON Schema.

Inside JSON the matcher binds a text's keywords itself. Where a text stands bare they are given here
as terminals of its Lark. Expressions are those of Rust's syntax, without slashes around them.
"""

from __future__ import annotations

import re
from decimal import Decimal

_DIGIT2 = "[0-5][0-9]"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    "(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-"
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP}-02-29)"
)
_ZONE = f"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):{_DIGIT2})"
_TIME = rf"(?:[01][0-9]|2[0-3]):{_DIGIT2}:{_DIGIT2}(?:\.[0-9]+)?{_ZONE}"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
_HEX = "[0-9a-fA-F]"
_URI = r"(?:[a-zA-Z0-9._~:/?@!$&'()*+,;=-]|%[0-9a-fA-F]{2})"
_CLOCK = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DAYS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"


def _ipv6() -> str:
    group = f"{_HEX}{{1,4}}"
    forms = [f"(?:{group}:){{7}}{group}", f"(?:{group}:){{6}}{_IPV4}"]
    for before in range(8):
        head = f"(?:{group}(?::{group}){{0,{before - 1}}})?" if before else ""
        after = 6 - before
        if after >= 0:
            forms.append(f"{head}::(?:{group}(?::{group}){{0,{after}}})?")
        if after >= 2:
            forms.append(f"{head}::(?:{group}:){{0,{after - 2}}}{_IPV4}")
    return f"(?:{'|'.join(forms)})"


FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": f"P(?:{_DAYS}(?:{_CLOCK})?|{_CLOCK}|[0-9]+W)",
    "email": rf"{_ATOM}(?:\.{_ATOM})*@{_HOST}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "uuid": f"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
    "uri": f"[a-zA-Z][a-zA-Z0-9+.-]*:{_URI}+(?:#{_URI}*)?",
}


def lengths(least: int, most: int | None) -> str:
    """Texts of so many characters."""
    return rf"(?s:.{{{least},{'' if most is None else most}}})"


def whole_numbers(least: int | None, most: int | None) -> str | None:
    """The whole numbers from `least` to `most`, as JSON writes them; None bounds nothing. None if
    there are none.
    """
    if least is not None and most is not None and least > most:
        return None
    found = []
    if most is None or most >= 0:
        found += _digits(max(least or 0, 0), most)
    if least is None or least < 0:
        highest = -most if most is not None and most < 0 else 1
        found += [f"-{one}" for one in _digits(highest, None if least is None else -least)]
    return f"(?:{'|'.join(found)})"


def at_least(bound: Decimal, is_open: bool) -> str | None:
    """Decimals of at least `bound`, or more than it, without exponents; None if there are none."""
    if bound > 0 or (bound == 0 and is_open):
        return _above(bound, is_open)
    below = _below(-bound, is_open)
    return f"(?:-{below}|{_ANY_DECIMAL})"


def at_most(bound: Decimal, is_open: bool) -> str | None:
    """Decimals of at most `bound`, or less than it, without exponents; None if there are none."""
    if bound < 0 or (bound == 0 and is_open):
        return f"-{_above(-bound, is_open)}"
    return f"(?:{_below(bound, is_open)}|-{_ANY_DECIMAL})"


_FRACTION = r"(?:\.[0-9]+)?"
_ANY_DECIMAL = rf"(?:0|[1-9][0-9]*){_FRACTION}"


def _above(bound: Decimal, is_open: bool) -> str:
    """Decimals from `bound`, which is not negative, without a sign."""
    whole, fraction = _parts(bound)
    rest = "0*[1-9][0-9]*" if is_open else "[0-9]*"
    options = [
        f"{fraction[:at]}[{int(digit) + 1}-9][0-9]*"
        for at, digit in enumerate(fraction)
        if digit != "9"
    ]
    found = [rf"{whole}\.(?:{'|'.join([*options, fraction + rest])})"]
    if not fraction:
        found = [rf"{whole}\.{rest}" if is_open else f"{whole}{_FRACTION}"]
    return f"(?:{'|'.join([*found, f'{whole_numbers(int(whole) + 1, None)}{_FRACTION}'])})"


def _below(bound: Decimal, is_open: bool) -> str:
    """Decimals up to `bound`, which is not negative, without a sign. The bound is above 0 if it
    is open."""
    whole, fraction = _parts(bound)
    found = []
    if int(whole) > 0:
        found.append(f"{whole_numbers(0, int(whole) - 1)}{_FRACTION}")
    options = [
        f"{fraction[:at]}[0-{int(digit) - 1}][0-9]*"
        for at, digit in enumerate(fraction)
        if digit != "0"
    ]
    options += [fraction[:at] for at in range(1, len(fraction))]
    if not is_open:
        options.append(f"{fraction}0*" if fraction else "0+")
    if fraction:
        found.append(rf"{whole}(?:\.(?:{'|'.join(options)}))?")
    elif not is_open:
        found.append(rf"{whole}(?:\.0+)?")
    return f"(?:{'|'.join(found)})"


def _parts(bound: Decimal) -> tuple[str, str]:
    """(digits before the point, digits behind it without zeros at their end)."""
    whole, _, fraction = f"{bound:f}".partition(".")
    return whole, fraction.rstrip("0")


def _digits(least: int, most: int | None) -> list[str]:
    """Expressions of the numbers from `least`, which is not negative."""
    found = []
    first = str(least)
    for length in range(len(first), len(first if most is None else str(most)) + 1):
        low = max(least, 10 ** (length - 1) if length > 1 else 0)
        high = 10**length - 1 if most is None else min(most, 10**length - 1)
        found += _same_length(str(low), str(high))
    if most is None:
        found.append(f"[1-9][0-9]{{{len(first)},}}")
    return found


def _same_length(low: str, high: str) -> list[str]:
    """Expressions of the numbers between two of the same length."""
    if not low:
        return [""]
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return [f"[{low[0]}-{high[0]}]" + (f"[0-9]{{{rest}}}" if rest else "")]
    if low[0] == high[0]:
        return [low[0] + one for one in _same_length(low[1:], high[1:])]
    found = [low[0] + one for one in _same_length(low[1:], "9" * rest)]
    if int(high[0]) - int(low[0]) > 1:
        found += _same_length(f"{int(low[0]) + 1}{'0' * rest}", f"{int(high[0]) - 1}{'9' * rest}")
    return found + [high[0] + one for one in _same_length("0" * rest, high[1:])]


def searched(pattern: str) -> str | None:
    """Texts in which a schema's pattern finds something; None if it has anchors in its middle."""
    found = []
    for option in _options(pattern):
        starts = option.startswith("^")
        ends = option.endswith("$") and not re.search(r"(?<!\\)(?:\\\\)*\\\$\Z", option)
        inner = option[starts : len(option) - ends]
        if _ANCHOR.search(_OTHERS.sub("", inner)):
            return None
        found.append(("" if starts else "(?s:.*)") + f"(?:{inner})" + ("" if ends else "(?s:.*)"))
    return f"(?:{'|'.join(found)})"


_CLASS = r"\[\^?\]?(?:\\[\s\S]|[^\]\\])*\]"
_OTHERS = re.compile(rf"\\[^bB]|{_CLASS}")  # what is no anchor, whatever it holds
_ANCHOR = re.compile(r"[\^$]|\\[bB]")


def _options(pattern: str) -> list[str]:
    """The pattern's alternatives, those within groups not counted."""
    options, depth = [""], 0
    for part in re.findall(rf"\\[\s\S]|{_CLASS}|[\s\S]", pattern):
        depth += (part == "(") - (part == ")")
        if part == "|" and depth == 0:
            options.append("")
        else:
            options[-1] += part
    return options
