"""Pages of the documentation site from outside docs/: README, changelog, ledger and others.

A hook of MkDocs. It adds these files as pages and rewrites their relative links, and those that
lead to them, so that the strict build checks them like all others.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository -> path in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/LEDGER.md": "ledger.md",
    "benchmarks/PREDICTIONS.md": "predictions.md",
    "models/mini/README.md": "mini.md",
}
ASSETS = {"models/mini/results/training.png": "images/training.png"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and pictures from outside docs/."""
    for source, target in (PAGES | ASSETS).items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to what the site has, from paths in the repository to paths in the site."""
    target = page.file.src_uri
    source = next((a for a, b in PAGES.items() if b == target), f"docs/{target}")

    def rewrite(link: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", link[0]):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[0]))
        site = (PAGES | ASSETS).get(path) or path.removeprefix("docs/")
        if not path.startswith("docs/") and path == site:
            return link[0]  # not on the site: the strict build names it
        return posixpath.relpath(site, posixpath.dirname(target) or ".")

    return LINK.sub(rewrite, markdown)
