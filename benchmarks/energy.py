"""The energy that a GPU has taken, as NVML counts it: all of the device, not one process."""

from __future__ import annotations

from collections.abc import Callable


class Energy:
    """Joules of GPU 0; NaN where NVML does not tell. The count moves some ten times a second."""

    def __init__(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._read: Callable[[], float] = lambda: (
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            )
            self._read()
        except Exception:
            self._read = lambda: float("nan")

    def joules(self) -> float:
        return self._read()
