"""What is rendered: the file, its settings, and what follows for pods, names, ports and times.

Manifests, machines' files and the guide all take their numbers from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from millrace.deploy.layout.clouds import cloud_gpu, machine_for
from millrace.deploy.layout.deploy_file import DeployFile
from millrace.deploy.layout.settings import Settings
from millrace.errors import ConfigError
from millrace.model_lookup import shipped_models
from millrace.version import __version__

PORT = 8000  # of replicas and of the gateway
ADMIN_PORT = 8001  # of the gateway, on loopback: kubectl port-forward reaches it
RANK_PORT = 29500  # where the ranks of several hosts meet
ENGINE_END = 10  # seconds that a replica's engine may take to end, once its requests have
UNLISTED = 5  # seconds until nobody sends to a pod that is going: endpoints and names take that
MODELS = "/models"
CACHES = "/cache"
GIB = 1 << 30


@dataclass(frozen=True)
class Layout:
    """engines: replicas in one pod. count: pods, or groups of pods that are one replica."""

    file: DeployFile
    settings: Settings
    engines: int
    count: int

    # --- names -----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def replica_name(self) -> str:
        return f"{self.name}-replica"

    @property
    def replica_service(self) -> str:
        """A name of which every address is a replica."""
        return f"{self.name}-replicas"

    @property
    def gateway_name(self) -> str:
        return f"{self.name}-gateway"

    @property
    def volume(self) -> str:
        return f"{self.name}-model"

    @property
    def cache(self) -> str:
        return f"{self.name}-cache"

    @property
    def entry(self) -> str:
        """The Service that clients use."""
        return self.name

    # --- the model -------------------------------------------------------------------------------

    @cached_property
    def ships(self) -> bool:
        """Whether the model comes with the package, so that it needs no volume."""
        return self.file.model in shipped_models()

    @property
    def directory(self) -> str:
        """The model's directory in a pod, or its name."""
        if self.ships:
            return self.file.model
        return f"{MODELS}/{self.file.model.rstrip('/').rsplit('/', 1)[-1]}"

    @property
    def served_name(self) -> str:
        return self.file.model.rstrip("/").removeprefix("gs://").removeprefix("s3://")

    @property
    def model_size(self) -> str:
        """Of the volume: a third more than the weights, in tens of GiB."""
        if self.file.model_volume.size:
            return self.file.model_volume.size
        planned = self.settings.planned
        weights = planned.memory.weights * self.settings.ranks if planned else 64 * GIB
        return f"{math.ceil(weights * 1.3 / GIB / 10) * 10}Gi"

    # --- pods ------------------------------------------------------------------------------------

    @property
    def gpus(self) -> int:
        """GPUs of one pod."""
        if not self.file.has_gpus:
            return 0
        return self.settings.ranks * self.engines // self.file.hosts

    @property
    def bench_gpus(self) -> int:
        """GPUs of the benchmark's pod, which serves all its replicas itself; at least 1."""
        part = self.file.bench
        return self.settings.ranks * max(part.replicas, default=1) if part else 0

    @property
    def cache_alone(self) -> bool:
        """Whether one pod alone compiles: its cache may be a disk."""
        return self.count == 1 and not self.groups and self.file.autoscale is None

    @property
    def groups(self) -> bool:
        """Whether a replica is a group of pods."""
        return self.file.hosts > 1

    @property
    def holds(self) -> bool:
        """Whether the gateway keeps requests while no replica is up."""
        return self.file.entry == "gateway" and self.file.gateway.hold_timeout > 0

    @property
    def image(self) -> str:
        if self.file.image:
            return self.file.image
        if self.file.engine == "vllm":
            return "vllm/vllm-openai:v0.30.0"
        return f"millrace:{__version__}-cuda" if self.file.has_gpus else self.cpu_image

    @property
    def cpu_image(self) -> str:
        """Of the gateway, the download and the benchmark's client: it needs no GPU."""
        return self.file.cpu_image or f"millrace:{__version__}"

    @property
    def requests_per_pod(self) -> int:
        """What a pod is meant to have at a time: a quarter less than what it can run."""
        wanted = self.file.autoscale.requests if self.file.autoscale else 0
        return wanted or max(1, self.settings.sequences * self.engines * 3 // 4)

    @property
    def grace(self) -> int:
        """Seconds from the order to stop to the kill: nobody sends any more, requests end, the
        engine ends."""
        return UNLISTED + self.file.drain + ENGINE_END + 5

    @property
    def hourly(self) -> float | None:
        """Dollars while all pods run; None: no price is known."""
        return self.hourly_of(self.count)

    def hourly_of(self, count: int) -> float | None:
        """Dollars of all GPUs that so many pods, or groups of them, keep."""
        price = self.settings.price
        return None if price is None else price.dollars * self.paid_gpus(count)

    def paid_gpus(self, count: int) -> int:
        """GPUs of the machines: clouds sell whole ones, and Autopilot gives each pod its own."""
        pods, size = count * self.file.hosts, self.machine_gpus(self.gpus)
        share = 1 if self.file.platform == "gke-autopilot" else size // max(1, self.gpus)
        return -(-pods // max(1, share)) * size

    def machine_gpus(self, gpus: int) -> int:
        """GPUs of the machine for a pod with so many; these, where nobody sells machines."""
        if not gpus or self.file.platform in ("plain", "machine"):
            return gpus
        return machine_for(self.file.platform, self.file.gpu, gpus)[0]


def layout_of(file: DeployFile, settings: Settings) -> Layout:
    """Raises ConfigError where GPUs, machines and numbers do not go together."""
    engines = _engines(file, settings)
    if settings.ranks % file.hosts:
        raise ConfigError(
            f"hosts: {settings.ranks} ranks do not divide over {file.hosts} hosts; set "
            f"settings.tensor_parallel_size to a multiple of {file.hosts}"
        )
    if settings.replicas % engines:
        fits = engines * max(1, settings.replicas // engines)
        raise ConfigError(
            f"replicas: {settings.replicas} do not fill machines of {engines}; {fits} do"
        )
    found = Layout(file, settings, engines, settings.replicas // engines)
    if file.has_gpus and file.platform not in ("plain", "machine"):
        _check_machine(found)
    if file.has_gpus and file.bench is not None:
        _check_bench(found)
    return found


def _engines(file: DeployFile, settings: Settings) -> int:
    """Replicas of one pod."""
    if file.platform == "machine":
        return settings.replicas
    if file.pods == "replica":
        return 1
    if not file.has_gpus:
        return settings.replicas
    machine = max(cloud_gpu(file.platform, file.gpu).machines)
    fits = [n for n in (machine, *cloud_gpu(file.platform, file.gpu).machines) if n >= 1]
    total = settings.ranks * settings.replicas
    size = max((n for n in fits if n <= total), default=min(fits))
    if settings.ranks > size:
        raise ConfigError(
            f"pods: machine: a replica of {settings.ranks} GPUs does not fit into one of {size}; "
            "use pods: replica and hosts: 2"
        )
    return min(size // settings.ranks, settings.replicas)


def _check_machine(found: Layout) -> None:
    file = found.file
    size, machine = machine_for(file.platform, file.gpu, found.gpus)
    if file.platform == "gke-autopilot" and size > found.gpus:
        raise ConfigError(
            f"platform: Autopilot gives each GPU pod a whole machine, here {machine} with {size} "
            f"GPUs for a pod that uses {found.gpus}; use pods: machine, or platform: gke-standard"
        )


def _check_bench(found: Layout) -> None:
    """All replicas that it compares run in one pod."""
    part, ranks = found.file.bench, found.settings.ranks
    assert part is not None
    most = max(cloud_gpu(found.file.platform, found.file.gpu).machines)
    if not part.replicas or min(part.replicas) < 1:
        raise ConfigError(f"bench.replicas: {list(part.replicas)}; use counts such as [1, 2, 3]")
    if found.bench_gpus > most:
        fits = [count for count in part.replicas if count * ranks <= most]
        instead = f"use bench: {{replicas: {fits}}}" if fits else "leave bench out"
        raise ConfigError(
            f"bench: {max(part.replicas)} replicas of {ranks} GPUs do not fit into a machine of "
            f"{most}; {instead}"
        )
