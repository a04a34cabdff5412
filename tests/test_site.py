"""The documentation site: every page is in its navigation, and every link leads somewhere."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOK = ast.parse((ROOT / "docs" / "site.py").read_text(encoding="utf-8"))


def outside() -> list[str]:
    """The files outside docs/ that the hook of the site names."""
    found: list[str] = []
    for node in HOOK.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            found += ast.literal_eval(node.value)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of everything that the site is made of."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", *outside()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)


def test_the_site_builds_without_a_warning(tree: Path) -> None:
    done = build(tree)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.stem for path in (tree / "build" / "site").glob("*.html")}
    assert pages >= {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing"}
    start = (tree / "build" / "site" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'<img [^>]*src="images/architecture.svg"', start)


@pytest.mark.parametrize(
    ("file", "link"),
    [
        ("README.md", "[gone](docs/gone.md)"),
        ("README.md", "[gone](docs/model.md#gone)"),
        ("README.md", "[gone](src/gone.py)"),
        ("docs/model.md", "[gone](../benchmarks/GONE.md)"),
        ("CONTRIBUTING.md", "![gone](docs/images/gone.svg)"),
    ],
)
def test_a_broken_link_fails_the_build(tree: Path, file: str, link: str) -> None:
    with (tree / file).open("a", encoding="utf-8") as page:
        page.write(f"\n{link}\n")
    done = build(tree)
    assert done.returncode != 0
    assert "gone" in done.stderr.lower()


def test_a_page_outside_the_navigation_fails_the_build(tree: Path) -> None:
    (tree / "docs" / "lonely.md").write_text("# Lonely\n")
    done = build(tree)
    assert done.returncode != 0
    assert "lonely.md" in done.stderr
