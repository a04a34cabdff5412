"""Plain data as YAML: keys in their order, no anchors, one document for each object."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def yaml_text(content: Any) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False, width=100, allow_unicode=True))


def documents(objects: Iterable[Any]) -> str:
    return "---\n".join(yaml_text(one) for one in objects)
