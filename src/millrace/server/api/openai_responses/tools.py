"""Tools of /v1/responses as tools of a chat, and the way back from a call's name.

A namespace groups functions and custom tools; the model sees each as `NAMESPACE__NAME`, as agents
name the tools of MCP servers. What a tool is to a model is not known here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from millrace.errors import RequestError
from millrace.server.api.fields import note_tool_keys, warn_once


class OfferedTool(NamedTuple):
    """One tool as the client offered it. namespace: None where it stands alone."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None


def chat_tools(
    given: Sequence[Mapping[str, Any]] | None,
) -> tuple[list[dict[str, Any]], dict[str, OfferedTool]]:
    """(tools of a chat, the offered tool behind each name that the model knows). Raises
    RequestError."""
    tools: list[dict[str, Any]] = []
    offered: dict[str, OfferedTool] = {}
    for at, one in _without_searches(given or ()):
        for tool, where, group in _flat(one, f"tools[{at}]"):
            made, kind = _tool(tool, where)
            tools.append(made)
            name = made[kind].get("name")
            if isinstance(name, str):  # else it is refused where tools are read
                shown = made[kind]["name"] = flat_name(name, group)
                offered[shown] = OfferedTool(kind, name, group)
    return tools, offered


def _without_searches(
    given: Sequence[Mapping[str, Any]],
) -> list[tuple[int, Mapping[str, Any]]]:
    """Each tool and its place, but for searches of the web beside others: agents offer them
    unasked, and the server runs none. One that is all that is offered is refused."""
    numbered = list(enumerate(given))
    others = [one for one in numbered if not str(one[1].get("type")).startswith("web_search")]
    if others and len(others) < len(numbered):
        warn_once("tools: web_search is left out, because the server runs no tools", logging.INFO)
    return others or numbered


def flat_name(name: Any, namespace: Any) -> Any:
    """The name by which the model knows a tool."""
    if isinstance(name, str) and isinstance(namespace, str) and namespace:
        return f"{namespace}__{name}"
    return name


def _flat(
    given: Mapping[str, Any], where: str
) -> Iterator[tuple[Mapping[str, Any], str, str | None]]:
    """(tool, its place, its namespace) of an entry. The first tool of a namespace tells of it."""
    if given.get("type") != "namespace":
        yield given, where, None
        return
    name, tools = given.get("name"), given.get("tools")
    if not isinstance(name, str) or not name or not isinstance(tools, list) or not tools:
        message = f"{where}: a namespace needs a name and a list of tools, at least one"
        raise RequestError(message, param="tools")
    told = given.get("description")
    for at, tool in enumerate(tools):
        place = f"{where}.tools[{at}]"
        if not isinstance(tool, Mapping):
            raise RequestError(f"{place} must be a function or a custom tool", param="tools")
        if told and at == 0:
            own = tool.get("description")
            words = f"(Of {name}: {told})" + (f"\n{own}" if own else "")
            tool = {**tool, "description": words}
        yield tool, place, name


def _tool(
    tool: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], Literal["function", "custom"]]:
    kind = tool.get("type")
    if kind == "function":
        nested = tool.get("function")
        tool = nested if isinstance(nested, Mapping) else tool
        note_tool_keys(tool)
        named = ("name", "description", "parameters", "strict")
        function = {key: tool[key] for key in named if tool.get(key) is not None}
        return {"type": "function", "function": function}, "function"
    if kind == "custom":
        custom = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
        form = tool.get("format")
        if isinstance(form, Mapping) and form.get("type") == "grammar":
            form = {"type": "grammar", "grammar": {**form}}
        return {"type": "custom", "custom": {**custom, "format": form}}, "custom"
    raise RequestError(
        f"{where}: the server runs no tools such as {str(kind)[:60]!r}; describe it as a function "
        "or a custom tool and run it yourself",
        param="tools",
    )


def chat_tool_choice(given: Any, offered: Mapping[str, OfferedTool]) -> Any:
    """tool_choice as chats write it."""
    if not isinstance(given, Mapping):
        return given
    kind = given.get("type")
    if kind in ("function", "custom", "tool"):
        nested = given.get(str(kind))
        name = (nested if isinstance(nested, Mapping) else given).get("name")
        named = flat_name(name, given.get("namespace"))
        kind = "custom" if kind == "custom" else "function"
        return {"type": kind, kind: {"name": _known(named, offered)}}
    if kind == "allowed_tools" and isinstance(given.get("tools"), list):
        some = [one for tool in given["tools"] for one in _allowed(tool, offered)]
        return {"type": "allowed_tools", "allowed_tools": {**given, "tools": some}}
    return dict(given)


def _allowed(given: Any, offered: Mapping[str, OfferedTool]) -> list[Any]:
    """One of the allowed tools, or all of a namespace."""
    if isinstance(given, Mapping) and given.get("type") == "namespace":
        names = [name for name, tool in offered.items() if tool.namespace == given.get("name")]
        return [{"type": "function", "function": {"name": name}} for name in names]
    return [chat_tool_choice(given, offered)]


def _known(name: Any, offered: Mapping[str, OfferedTool]) -> Any:
    """The name that the model knows; of a tool that only one namespace has, its own name does."""
    if not isinstance(name, str) or name in offered:
        return name
    within = [shown for shown, tool in offered.items() if tool.name == name]
    return within[0] if len(within) == 1 else name
