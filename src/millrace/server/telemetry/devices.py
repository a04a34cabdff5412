"""Power, energy and utilisation of the GPUs that the engine runs on, read once a second by a thread
of the server process, so that neither a scrape nor a step waits for a driver."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from millrace.hardware.nvml import Device, Nvml

EVERY = 1.0  # seconds


class DeviceSampler:
    """Samples of some GPUs by their UUIDs; nothing runs before `start`.

    samples: the latest, by the GPU's number and its UUID, which for an instance of a divided GPU is
    that of the whole one. problem: why there are none.
    """

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], dict[str, float]] = {}
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
        wanted = _named(nvml.devices, self._uuids)
        if not wanted and not self.problem:
            self.problem = "the driver shows none of the engine's GPUs"
        while wanted:
            self.samples = {
                (device.label, device.gpu_uuid): nvml.sample(device) for device in wanted
            }
            if ended.wait(EVERY):
                return


def _named(devices: Sequence[Device], uuids: Sequence[str]) -> list[Device]:
    """Those with one of these UUIDs. CUDA calls instances of a divided GPU by theirs with another
    beginning than the driver does."""
    wanted = {uuid.partition("-")[2] for uuid in uuids}
    return [device for device in devices if device.uuid.partition("-")[2] in wanted]
