"""What is written down: the audit log and the feedback, one JSON object a line.

The audit log says who did what and which chunks were shown; it holds no text of a document.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from examples.insurance.retrieval.access import Asker


class Records:
    """Append-only; readable by this user alone."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        self._path = path

    def write(self, asker: Asker | None, action: str, **facts: Any) -> None:
        who = {"role": asker.role, "own": asker.policy} if asker else {"role": "nobody"}
        entry = {"time": round(time.time(), 3), **who, "action": action, **facts}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
