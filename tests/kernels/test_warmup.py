"""What fast paths declare is collected, and nothing is declared where nothing is compiled."""

from __future__ import annotations

import pytest

from millrace.kernels import dispatch
from millrace.kernels.cpu import attention, norm
from millrace.kernels.warmup import StepLimits, StepShape, Warmup, declared

LIMITS = StepLimits(rows=8, width=2, tokens=512, length=256)


def test_a_cpu_needs_nothing() -> None:
    assert declared("cpu", LIMITS) == Warmup()


def test_what_modules_declare_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    step = StepShape(1, ((0, 1),), context=200)

    def steps(limits: StepLimits) -> Warmup:
        return Warmup((step,), frozenset({limits.tokens}))

    def copies(limits: StepLimits) -> Warmup:
        return Warmup(tokens=frozenset({16}), snapshots=True)

    monkeypatch.setattr(attention, "warmup", steps, raising=False)
    monkeypatch.setattr(norm, "warmup", copies, raising=False)
    assert declared("cpu", LIMITS) == Warmup((step,), frozenset({16, 512}), snapshots=True)


def test_what_was_found_out_about_a_machine_is_forgotten() -> None:
    asked = []

    @dispatch.remembered
    def devices(kind: str) -> int:
        asked.append(kind)
        return len(asked)

    assert [devices("a"), devices("a"), devices("b")] == [1, 1, 2]
    dispatch.forget()
    assert devices("a") == 3
