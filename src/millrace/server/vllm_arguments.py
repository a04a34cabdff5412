"""A command line as vLLM's users write it, rewritten into the one that `millrace serve` reads.

Short forms, second names, underscores, JSON in parts (`--speculative-config.method mtp`), lists
behind one flag and `--config file.yaml` become plain options. Flags without an effect here are
dropped with a note, flags that cannot work are refused; `millrace.vllm_flags` says which. What an
option means, and whether its value works, is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

from millrace.common.yaml_file import read_mapping
from millrace.errors import ConfigError
from millrace.vllm_flags import PARTS, REFUSED_VALUES, SYNONYMS, TABLE, Row, positive_form

_OPTIMIZATION = re.compile(r"-O=?(\d)")
_NUMBER = re.compile(r"-\d")
_DOTTED = re.compile(r"(--[a-z0-9-]+)\.([\w.-]+)")


class Rewritten(NamedTuple):
    """Arguments for `millrace serve`, and a note for each flag that was dropped."""

    arguments: list[str]
    notes: list[str]


class Item(NamedTuple):
    """One option with its values, or (flag "") a positional argument."""

    flag: str
    values: tuple[str, ...] = ()


class Options(NamedTuple):
    """The options of a command: those that are switched, those with a value, and of these those
    that may be repeated."""

    switches: frozenset[str]
    valued: frozenset[str]
    repeated: frozenset[str]

    @classmethod
    def of(cls, command: click.Command) -> Options:
        params = [param for param in command.params if isinstance(param, click.Option)]
        names = {name: param for param in params for name in (*param.opts, *param.secondary_opts)}
        return cls(
            frozenset(name for name, param in names.items() if param.is_flag),
            frozenset(name for name, param in names.items() if not param.is_flag),
            frozenset(name for name, param in names.items() if param.multiple),
        )


def rewrite(arguments: Sequence[str], options: Options) -> Rewritten:
    """What `arguments` are to `millrace serve`. Raises ConfigError for flags that cannot work."""
    items = [_plain_switch(item, options) for item in _read(arguments, options)]
    files = [item.values[0] for item in items if item.flag == "--config" and item.values]
    items = [item for item in items if item.flag != "--config"]
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times; one file works")
    if files:
        of_file = _read(_of_file(Path(files[0]).expanduser(), options), options)
        items = _merged([_plain_switch(item, options) for item in of_file], items)
    notes: dict[str, str] = {}
    kept = [item for item in items if not _dropped(item, options, notes)]
    kept = list(_joined_parts(kept))
    return Rewritten(list(_written(kept)), [f"{flag} ({why})" for flag, why in notes.items()])


# --- reading -----------------------------------------------------------------------------------


def _read(arguments: Iterable[str], options: Options) -> Iterator[Item]:
    words = list(arguments)
    seen_model = False
    while words:
        word = words.pop(0)
        if word == "--":
            yield from (Item("", (rest,)) for rest in words)
            return
        if not word.startswith("-") or word == "-" or _NUMBER.match(word):
            seen_model = True
            yield Item("", (word,))
            continue
        flag, equals, value = _flag(word)
        if equals:
            yield Item(flag, (value,))
        elif flag in options.repeated and seen_model:
            yield Item(flag, tuple(_list_values(words)))
        elif _takes_value(flag, options) and words:
            yield Item(flag, (words.pop(0),))
        else:
            yield Item(flag)


def _flag(word: str) -> tuple[str, str, str]:
    """(Millrace's or vLLM's long name, "=" or nothing, value) of a word that is a flag."""
    if found := _OPTIMIZATION.fullmatch(word):
        return "--optimization-level", "=", found.group(1)
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        base, dot, path = name.partition(".")
        name = base.replace("_", "-") + dot + path
    while name in SYNONYMS:
        name = SYNONYMS[name]
    return name, equals, value


def _plain_switch(item: Item, options: Options) -> Item:
    """`--disable-x` as `--no-enable-x` where that is an option, and the other way round."""
    opposite = positive_form(item.flag)
    if item.flag in options.switches or opposite is None or opposite[1]:
        return item
    negative = f"--no-{opposite[0][2:]}"
    return Item(negative, item.values) if negative in options.switches else item


def _list_values(words: list[str]) -> Iterator[str]:
    """vLLM takes a list behind one flag, up to the next flag; the first may be anything."""
    if words:
        yield words.pop(0)
    while words and not words[0].startswith("-"):
        yield words.pop(0)


def _takes_value(flag: str, options: Options) -> bool:
    if flag in options.valued or flag in PARTS or flag in ("--config", "--model"):
        return True
    row = TABLE.get(flag)
    return bool(_DOTTED.fullmatch(flag)) or (row is not None and row.takes_value)


# --- a file of options -------------------------------------------------------------------------


def _of_file(path: Path, options: Options) -> Iterator[str]:
    """The options in a YAML file, as words of a command line."""
    for key, value in read_mapping(path, f"--config {path}", "max-model-len: 4096").items():
        flag = f"--{key.lstrip('-').replace('_', '-')}"
        if isinstance(value, bool) and _takes_value(flag, options):
            yield f"{flag}={str(value).lower()}"
        elif isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        elif isinstance(value, list):
            yield from (f"{flag}={one}" for one in value)
        elif isinstance(value, dict):
            yield f"{flag}={_json_text(path, key, value)}"
        elif value is not None:
            yield f"{flag}={value}"


def _json_text(path: Path, key: str, value: dict[object, object]) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--config {path}: {key}: {error}") from None


def _merged(of_file: list[Item], given: list[Item]) -> list[Item]:
    """What the command line gives counts, and of the file the rest."""
    named = {_subject(item.flag) for item in given}
    if "" in named:
        named.add("--model")
    return [*(item for item in of_file if _subject(item.flag) not in named), *given]


def _subject(flag: str) -> str:
    return f"--{flag[5:]}" if flag.startswith("--no-") else flag


# --- what becomes of each ----------------------------------------------------------------------


def _dropped(item: Item, options: Options, notes: dict[str, str]) -> bool:
    """Whether the flag has no effect; why is put into `notes`. Raises ConfigError if refused."""
    flag = item.flag
    if found := _DOTTED.fullmatch(flag):
        flag = found.group(1)
    for value in item.values:
        if words := REFUSED_VALUES.get((flag, value)):
            raise ConfigError(f"{flag} {value}: {words}")
    if flag in ("", "--model") or flag in options.switches | options.valued or flag in PARTS:
        return False
    if (row := TABLE.get(flag)) is not None:
        if row.fate == "refused" and not _is_harmless_value(item, row):
            shown = f" {item.values[0]}" if row.takes_value and item.values else ""
            raise ConfigError(f"{flag}{shown}: {row.words}")
        notes[flag] = "as it is anyway" if row.fate == "refused" else row.words
        return True
    opposite = positive_form(flag)
    row = TABLE.get(opposite[0]) if opposite else None
    if row is None or row.takes_value:
        return False
    if row.words == "on already":
        raise ConfigError(f"{flag}: it is always on; leave it out")
    notes[flag] = row.words if row.fate == "harmless" else "off already"
    return True


def _is_harmless_value(item: Item, row: Row) -> bool:
    return bool(item.values) and item.values[0] in row.harmless_at


def _joined_parts(items: Iterable[Item]) -> Iterator[Item]:
    """The items, with JSON that is given in parts as one option behind them."""
    parts: dict[str, dict[str, Any]] = {}
    whole: dict[str, Item] = {}
    rest = list(items)
    for item in rest:
        if found := _part(item):
            base, path, value = found
            _put(parts.setdefault(base, {}), path, value)
        else:
            whole[item.flag] = item
    for item in rest:
        if _part(item) is None and item.flag not in parts:
            yield item
    for base, given in parts.items():
        found_whole = whole.get(base)
        start = _json(found_whole.values[0]) if found_whole and found_whole.values else {}
        if not isinstance(start, dict):
            raise ConfigError(f"{base} {start!r} is not a JSON object")
        merged = msgspec.json.encode(_merge(start, given)).decode()
        yield Item(base, (merged,))


def _part(item: Item) -> tuple[str, list[str], Any] | None:
    """(JSON option, keys, value) of a part."""
    if not item.values:
        return None
    if item.flag in PARTS:
        base, key = PARTS[item.flag]
        return base, [key], _json(item.values[0])
    found = _DOTTED.fullmatch(item.flag)
    return found and (found.group(1), found.group(2).split("."), _json(item.values[0]))


def _put(into: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        inner = into.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = into[key] = {}
        into = inner
    into[path[-1]] = value


def _merge(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _written(items: Iterable[Item]) -> Iterator[str]:
    for item in items:
        if item.flag in ("", "--model"):
            yield from item.values
        elif not item.values:
            yield item.flag
        else:
            yield from (f"{item.flag}={value}" for value in item.values)
