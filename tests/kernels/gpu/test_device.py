"""The memory of the device: its own, or the host's."""

from __future__ import annotations

import pytest
import torch

from millrace.kernels.gpu import device

GIB = 1 << 30


@pytest.mark.parametrize(
    ("unified", "used", "expected"),
    [(False, 20 * GIB, (9 * GIB, 120 * GIB)), (True, 20 * GIB, (99 * GIB, 119 * GIB)),
     (True, 119 * GIB, (0, 119 * GIB))],
)  # fmt: skip
def test_unified_memory_is_what_the_host_can_give(
    monkeypatch: pytest.MonkeyPatch, unified: bool, used: int, expected: tuple[int, int]
) -> None:
    """The driver says 9 GiB, because files are cached in the rest."""
    host = {"memory_total_bytes": 119.0 * GIB, "memory_used_bytes": float(used)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * GIB, 120 * GIB))
    monkeypatch.setattr(device, "is_unified", lambda: unified)
    monkeypatch.setattr(device, "shared_memory", lambda: host)
    assert device.memory() == expected


def test_a_host_that_does_not_tell_leaves_the_drivers_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9, 120))
    monkeypatch.setattr(device, "is_unified", lambda: True)
    monkeypatch.setattr(device, "shared_memory", dict)
    assert device.memory() == (9, 120)
