"""Rows of the table of GPUs, by the names that drivers give."""

from __future__ import annotations

import pytest

from millrace.hardware.gpus import gpu_of_device


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA GB10", "gb10"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("AMD MI300X", "mi300x"),
        ("NVIDIA H200 MIG 3g.71gb", "h200"),
        ("NVIDIA T4", None),
        ("", None),
    ],
)
def test_devices_are_found_by_their_drivers_names(device: str, name: str | None) -> None:
    found = gpu_of_device(device)
    assert (found.name if found else None) == name
