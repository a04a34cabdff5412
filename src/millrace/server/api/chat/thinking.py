"""`thinking` of a body, as Anthropic's API has it: whether a model reasons, and how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millrace.errors import RequestError


def thinking_variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Template variables that turn reasoning on or off; none leave it to the template."""
    if given is None:
        return {}
    kind = given.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        message = f"thinking.type must be enabled, adaptive or disabled, got {kind!r}"
        raise RequestError(message, param="thinking")
    return {"enable_thinking": kind != "disabled"}


def thinking_budget(given: Mapping[str, Any] | None) -> int | None:
    """The most tokens that the reasoning may have; None sets no limit."""
    budget = (given or {}).get("budget_tokens")
    if budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        message = f"thinking.budget_tokens must be an integer of at least 1, got {budget!r}"
        raise RequestError(message, param="thinking")
    return budget
