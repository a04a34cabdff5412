"""Power, energy and utilisation of the GPUs that the engine runs on, read once a second by a thread
of the server process, so that neither a scrape nor a step waits for a driver."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from millrace.hardware.nvml import Device, Nvml

EVERY = 1.0  # seconds


class DeviceSampler:
    """Samples of some GPUs by their UUIDs; nothing runs before `start`.

    samples: the latest, by the GPU's number. problem: why there are none.
    """

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, float]] = {}
        self.problem = ""
        self._uuids: tuple[str, ...] = ()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, uuids: Sequence[str]) -> None:
        """Sample these GPUs from here on. Without a GPU, or again for the same ones, nothing
        happens."""
        if not uuids or self._uuids == tuple(uuids):
            return
        self.close()
        self._uuids, self._ended = tuple(uuids), threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._ended,), name="gpu-samples", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5 * EVERY)

    def _run(self, ended: threading.Event) -> None:
        nvml = Nvml()
        self.problem = nvml.problem
        wanted = [device for device in nvml.devices if device.uuid in self._uuids]
        if not wanted and not self.problem:
            self.problem = "the driver shows none of the engine's GPUs"
        while wanted:
            self.samples = {device.label: self._sample(nvml, device) for device in wanted}
            if ended.wait(EVERY):
                return

    @staticmethod
    def _sample(nvml: Nvml, device: Device) -> dict[str, float]:
        return nvml.sample(device)
