"""The figures of the technical report are those that the ledger gives."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.figures import ledger
from benchmarks.figures.drawn import FIGURES

ROOT = Path(__file__).parents[1]
REPORT = (ROOT / "docs" / "technical-report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_figure_is_drawn_from_the_ledger_and_shown(name: str) -> None:
    drawn = FIGURES[name]()
    ElementTree.fromstring(drawn)
    assert (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8") == drawn, (
        "python -m benchmarks.figures draws it anew"
    )
    assert f"](images/{name}.svg)" in REPORT


def test_what_the_ledger_lacks_is_not_drawn() -> None:
    title = "Steps with prompts as CUDA graphs"
    with pytest.raises(LookupError, match="no section"):
        ledger.section("Steps in a dream")
    with pytest.raises(LookupError, match="no row"):
        ledger.row(title, "3,000 tokens alone")
    with pytest.raises(LookupError, match="nothing says"):
        ledger.sentence(title, "Where the 1 ms go:")
