"""Why prompts were not found in the prefix cache: what the engine said of the latest requests."""

from __future__ import annotations

from collections import OrderedDict

from millrace.protocol import CacheReport

MOST = 1024  # requests that are remembered


class CacheReports:
    """Reports by request id. Each is told only to who sent the request."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._reports: OrderedDict[str, tuple[str, int, CacheReport, str]] = OrderedDict()

    def add(
        self,
        request_id: str,
        owner: str,
        prompt_tokens: int,
        report: CacheReport,
        conversation: str = "",
    ) -> None:
        """owner: whose request it is; empty where there are no keys. conversation: as of a
        stream."""
        self._reports[request_id] = owner, prompt_tokens, report, conversation
        self._reports.move_to_end(request_id)
        while len(self._reports) > self._most:
            self._reports.popitem(last=False)

    def find(self, request_id: str, owner: str) -> tuple[int, CacheReport] | None:
        """(tokens of the prompt, report); None for an unknown request, or another one's."""
        found = self._reports.get(request_id)
        return None if found is None or found[0] != owner else found[1:3]

    def latest(self, owner: str) -> list[tuple[str, int, CacheReport, str]]:
        """(id, tokens of the prompt, report, conversation) of an owner's requests, newest first."""
        found: dict[int, tuple[str, int, CacheReport, str]] = {}
        for name, (whose, tokens, report, conversation) in reversed(self._reports.items()):
            if whose == owner:  # a request has several names
                found[id(report)] = name, tokens, report, conversation
        return list(found.values())
