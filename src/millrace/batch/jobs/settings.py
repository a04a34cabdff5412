"""Where the batches of a server are kept, and how much they may take."""

from __future__ import annotations

from pathlib import Path

import msgspec

from millrace.errors import ConfigError


class BatchSettings(msgspec.Struct, frozen=True):
    """directory: of the catalog. most_bytes: of all files. most_in_flight: of one batch."""

    directory: str
    most_bytes: int
    most_in_flight: int


def read_settings(directory: str, gigabytes: float, most_in_flight: int) -> BatchSettings:
    """The settings that flags give. Raises ConfigError."""
    if not 0 < gigabytes < float("inf"):
        raise ConfigError(f"--batch-dir-gb {gigabytes}: use more than 0")
    if most_in_flight < 1:
        raise ConfigError(f"--batch-max-in-flight {most_in_flight}: use 1 or more")
    return BatchSettings(str(Path(directory).absolute()), int(gigabytes * 1e9), most_in_flight)
