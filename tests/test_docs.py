"""What the documents list is what there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from millrace import vllm_flags
from millrace.config import EngineArgs
from millrace.server.api import field_table
from millrace.server.api.request_schema import ChatRequest, CompletionRequest
from millrace.server.options import ServerOptions
from millrace.server.routes import ROUTES
from millrace.server.telemetry.metrics import COUNTERS, GAUGES, HISTOGRAMS

ROOT = Path(__file__).resolve().parents[1]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """From a heading to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found.group(1)


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_every_field_is_documented() -> None:
    both = quoted(section(API, "Of both endpoints"))
    chat = both | quoted(section(API, "Of /v1/chat/completions"))
    text = both | quoted(section(API, "Of /v1/completions"))
    assert set(ChatRequest.__struct_fields__) <= chat
    assert set(CompletionRequest.__struct_fields__) <= text


def test_the_page_of_fields_is_made_from_their_table() -> None:
    page = (ROOT / "docs" / "api_fields.md").read_text(encoding="utf-8")
    assert page == field_table.page()  # python -m millrace.server.api.field_table


def test_every_path_is_documented() -> None:
    paths = {route.path.replace(":path", "") for route in ROUTES if not route.manages}
    assert paths
    assert all(f" {path}`" in API for path in paths)
    managing = section(OPERATIONS, "Pause and sleep")
    assert all(row.path in managing for row in ROUTES if row.manages)


def test_the_page_of_vllms_flags_is_made_from_their_table() -> None:
    page = (ROOT / "docs" / "vllm_flags.md").read_text(encoding="utf-8")
    assert page == vllm_flags.page()  # python -m millrace.vllm_flags > docs/vllm_flags.md


def test_every_metric_is_documented() -> None:
    names = quoted(section(OPERATIONS, "Metrics"))
    for name, vllm_name, *_ in (*GAUGES, *HISTOGRAMS):
        assert (name or vllm_name) in names
    for name, vllm_name, *_ in COUNTERS:
        assert f"{name or vllm_name}_total" in names


@pytest.mark.parametrize(
    "extra",
    [None, "bench", "deploy", "docs", "example", "gpu", "otel", "pd", "plan", "test", "tune"],
)
def test_every_dependency_has_its_reason(extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([a-z0-9-]+) \|", section(page, f"Extra `{extra}`" if extra else "Base"), re.MULTILINE
    )
    assert {re.split(r"[><=]", one)[0] for one in wanted} == set(rows) - {"package"}


def test_the_flags_of_the_operations_page_exist() -> None:
    known = {*ServerOptions.__struct_fields__, *EngineArgs.__struct_fields__}
    known |= {"json", "collectives", "hosts", "base_url", "requests"}  # of other commands
    flags = re.findall(r"`?--(?:no-)?([a-z][a-z-]+)", OPERATIONS)
    assert {flag.replace("-", "_") for flag in flags} <= known


@pytest.mark.parametrize("name", ["extending", "batch"])
def test_parts_of_programs_are_in_the_tree(name: str) -> None:
    """Every Python example of these pages is a part of a file, but for its indentation."""
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert examples
    files = [
        path for place in ("examples", "src", "tests") for path in (ROOT / place).rglob("*.py")
    ]
    texts = [stripped(path.read_text(encoding="utf-8")) for path in files]
    missing = [text for text in examples if not any(stripped(text) in file for file in texts)]
    assert missing == []


def test_the_files_of_extensions_are_there() -> None:
    """Paths from the root that docs/extending.md names."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    named = {name for name in quoted(page) if re.match(r"(src|tests|benchmarks)/[\w/.]+$", name)}
    assert named
    assert [
        name for name in sorted(named) if "NAME" not in name and not (ROOT / name).exists()
    ] == []


def stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())
