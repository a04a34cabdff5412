"""How clouds name GPUs and the machines that have them. Prices are the planner's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from millrace.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CloudGpu:
    """machines: GPUs in one -> its type. label: what nodes with it are called."""

    machines: Mapping[int, str] = field(default_factory=dict)
    label: str = ""


GOOGLE: Mapping[str, CloudGpu] = {
    "l4": CloudGpu({1: "g2-standard-8", 2: "g2-standard-24", 4: "g2-standard-48",
                    8: "g2-standard-96"}, "nvidia-l4"),
    "a100-40": CloudGpu({1: "a2-highgpu-1g", 2: "a2-highgpu-2g", 4: "a2-highgpu-4g",
                         8: "a2-highgpu-8g"}, "nvidia-tesla-a100"),
    "a100-80": CloudGpu({1: "a2-ultragpu-1g", 2: "a2-ultragpu-2g", 4: "a2-ultragpu-4g",
                         8: "a2-ultragpu-8g"}, "nvidia-a100-80gb"),
    "h100": CloudGpu({1: "a3-highgpu-1g", 2: "a3-highgpu-2g", 4: "a3-highgpu-4g",
                      8: "a3-highgpu-8g"}, "nvidia-h100-80gb"),
    "h200": CloudGpu({8: "a3-ultragpu-8g"}, "nvidia-h200-141gb"),
    "b200": CloudGpu({8: "a4-highgpu-8g"}, "nvidia-b200"),
    "gb200": CloudGpu({4: "a4x-highgpu-4g"}, "nvidia-gb200"),
    "rtx-pro-6000": CloudGpu({1: "g4-standard-48", 2: "g4-standard-96", 4: "g4-standard-192",
                              8: "g4-standard-384"}, "nvidia-rtx-pro-6000"),
}  # fmt: skip
AMAZON: Mapping[str, CloudGpu] = {
    "l4": CloudGpu({1: "g6.2xlarge", 4: "g6.12xlarge", 8: "g6.48xlarge"}),
    "l40s": CloudGpu({1: "g6e.4xlarge", 4: "g6e.12xlarge", 8: "g6e.48xlarge"}),
    "a100-40": CloudGpu({8: "p4d.24xlarge"}),
    "a100-80": CloudGpu({8: "p4de.24xlarge"}),
    "h100": CloudGpu({1: "p5.4xlarge", 8: "p5.48xlarge"}),
    "h200": CloudGpu({8: "p5en.48xlarge"}),
    "b200": CloudGpu({8: "p6-b200.48xlarge"}),
    "b300": CloudGpu({8: "p6-b300.48xlarge"}),
}
PLAIN = CloudGpu({8: ""})  # what is assumed of a machine of unknown make
CLOUDS = {"gke-standard": GOOGLE, "gke-autopilot": GOOGLE, "eks": AMAZON}


def cloud_gpu(platform: str, gpu: str) -> CloudGpu:
    """A GPU as a platform has it. Raises ConfigError, with those it has, for any other."""
    table = CLOUDS.get(platform)
    if table is None:
        return PLAIN
    if gpu not in table:
        raise ConfigError(f"gpu: {platform} has no {gpu}; it has {', '.join(table)}")
    return table[gpu]


def machine_for(platform: str, gpu: str, count: int) -> tuple[int, str]:
    """(GPUs, type) of the smallest machine with at least so many GPUs. Raises ConfigError."""
    machines = cloud_gpu(platform, gpu).machines
    fits = [size for size in sorted(machines) if size >= count]
    if not fits:
        raise ConfigError(
            f"no machine of {platform} has {count} {gpu}; the largest has {max(machines)}: use "
            "fewer ranks, or hosts: 2"
        )
    return fits[0], machines[fits[0]]
