"""Writes every figure: python -m benchmarks.figures"""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures.drawn import FIGURES

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        path = IMAGES / f"{name}.svg"
        path.write_text(draw(), encoding="utf-8")
        print(path.relative_to(IMAGES.parents[1]))
