"""The rules for Prometheus that come with Millrace."""

from __future__ import annotations

from importlib import resources
from typing import Any

FILES = ("recording.yml", "alerts.yml")


def rule_files() -> dict[str, str]:
    """Name -> text of each file of rules."""
    folder = resources.files("millrace.observe").joinpath("prometheus")
    return {name: folder.joinpath(name).read_text() for name in FILES}


def rule_groups() -> list[dict[str, Any]]:
    """The groups of all files, as Prometheus reads them."""
    import yaml

    return [group for text in rule_files().values() for group in yaml.safe_load(text)["groups"]]
