"""deploy.yaml: what is to be served, on which GPUs, where. Every refusal names the key and what
would work.

It knows no Kubernetes object, and nothing of what settings cost.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from zoneinfo import available_timezones

import msgspec

from millrace.common.yaml_file import read_mapping
from millrace.errors import ConfigError, UserError
from millrace.target import parse_url

Platform = Literal["plain", "eks", "gke-standard", "gke-autopilot", "machine"]
Engine = Literal["millrace", "vllm", "sglang"]
EXAMPLE = "model: Qwen/Qwen3.5-27B-FP8"
NAME_LENGTH = 40  # objects add endings to it, and names have at most 63 characters
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_SIZE = re.compile(r"[1-9][0-9]*(Mi|Gi|Ti)")


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class LoadPart(_Part, frozen=True, kw_only=True):
    """What the planner assumes. input, output: mean tokens. concurrency: streams at once over all
    replicas; 0 with no rate: 64 for each replica. rate: requests a second. text: its kind."""

    input: float = 1024
    output: float = 256
    concurrency: float = 0
    rate: float = 0
    text: str = "mixed"


class GatewayPart(_Part, frozen=True, kw_only=True):
    """Pods and processes of the gateway. hold_timeout: seconds that requests wait while no replica
    is up. options: more flags of `millrace gateway`, by name."""

    pods: int = 1
    processes: int = 2
    hold_timeout: float = 900
    options: dict[str, Any] = {}


class SchedulePart(_Part, frozen=True, kw_only=True):
    """Pods that run from one cron moment to another, whatever the load."""

    start: str
    end: str
    pods: int
    timezone: str = "Etc/UTC"


class AutoscalePart(_Part, frozen=True, kw_only=True):
    """Bounds in pods. requests: that one pod is meant to have at a time; 0: three quarters of what
    its engines run. prometheus: address of a Prometheus, which the inference pool needs."""

    max: int
    min: int = 0
    requests: int = 0
    down_after: int = 300
    zero_after: int = 600
    schedules: list[SchedulePart] = []
    prometheus: str = ""


class VolumePart(_Part, frozen=True, kw_only=True):
    """storage_class: of the cluster; empty: the platform's usual one. size: empty: by the model."""

    storage_class: str = ""
    size: str = ""


class SplitPart(_Part, frozen=True, kw_only=True):
    """Pods that only prefill, and pods that only decode."""

    prefill: int
    decode: int


class DownloadPart(_Part, frozen=True, kw_only=True):
    """The machine that fills the model's volume: it needs no GPU."""

    arch: Literal["amd64", "arm64", "any"] = "any"
    cpu: str = "4"
    memory: str = "8Gi"


class RouterPart(_Part, frozen=True, kw_only=True):
    """In front of an inference pool. gateway_class: empty: the platform's. version: image tag of
    the endpoint picker."""

    gateway_class: str = ""
    version: str = "v0.10.0"


class GooglePart(_Part, frozen=True, kw_only=True):
    """Of Google's platforms. project .. cluster: for the cluster script. reservation: tried first.
    reservation_project: where it belongs to another project."""

    project: str = ""
    region: str = "us-central1"
    zones: list[str] = []
    cluster: str = ""
    reservation: str = ""
    reservation_project: str = ""


class BenchPart(_Part, frozen=True, kw_only=True):
    """The benchmark Job. flags: of `millrace bench scaling`; replicas: counts to compare."""

    replicas: tuple[int, ...] = (1, 2, 3)
    flags: tuple[str, ...] = ("--preset", "write-up")


class DeployFile(_Part, frozen=True, kw_only=True):
    """name, namespace: of the objects. model: an id on the hub, a gs:// or s3:// address, or a
    model that ships. shape: the catalogue's model that it is like, where the planner does not know
    it; `none` plans nothing. gpu: its kind, or `cpu`. replicas: engines; or gpus: how many there
    are, and the planner chooses. context: longest sequence. price: class of the machines; dollars:
    a GPU-hour, instead of the table's. settings: options of the engine, which the planner then
    checks; arguments: more, in the engine's own syntax. pods: one for each replica, or one for
    each machine with replicas inside. hosts: machines that one replica spans. drain: seconds that
    running requests get. resources: cpu and memory of a pod. traces: URL of a
    collector of traces, by OTLP over HTTP."""

    model: str
    gpu: str
    name: str = "millrace"
    namespace: str = "millrace"
    platform: Platform = "plain"
    engine: Engine = "millrace"
    shape: str = ""
    weights: str = "fp8"
    replicas: int = 0
    gpus: int = 0
    context: int = 4096
    price: Literal["on-demand", "reserved", "spot", "flex"] = "on-demand"
    dollars: float = 0
    load: LoadPart = LoadPart()
    settings: dict[str, Any] = {}
    arguments: list[str] = []
    environment: dict[str, str] = {}
    pods: Literal["replica", "machine"] = "replica"
    hosts: int = 1
    split: SplitPart | None = None
    entry: Literal["gateway", "service", "inference-pool"] = "gateway"
    gateway: GatewayPart = GatewayPart()
    router: RouterPart = RouterPart()
    autoscale: AutoscalePart | None = None
    image: str = ""
    cpu_image: str = ""
    image_pull_secret: str = ""
    hub_token_secret: str = ""
    api_key_secret: str = ""
    model_volume: VolumePart = VolumePart()
    cache_volume: VolumePart | None = None
    download: DownloadPart = DownloadPart()
    resources: dict[str, str] = {}
    node_selector: dict[str, str] = {}
    drain: int = 60
    monitoring: Literal["none", "prometheus", "google"] = "none"
    monitoring_namespaces: tuple[str, ...] = ("monitoring",)
    traces: str = ""
    google: GooglePart = GooglePart()
    bench: BenchPart | None = None

    @property
    def on_google(self) -> bool:
        return self.platform.startswith("gke-")

    @property
    def has_gpus(self) -> bool:
        return self.gpu != "cpu"


def read_deploy_file(path: Path) -> DeployFile:
    """The file's content. Raises ConfigError with the key that is wrong and what would work."""
    content = read_mapping(path, str(path), EXAMPLE)
    try:
        found = msgspec.convert(content, DeployFile)
        check(found)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_in_words(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return found


def _in_words(error: msgspec.ValidationError) -> str:
    """msgspec's message; for a key that does not exist also those that do."""
    text = str(error)
    found = re.search(r"unknown field `(\w+)`(?: - at `\$\.?([\w.]*)`)?", text)
    if not found:
        return text
    kind: Any = DeployFile
    for step in filter(None, (found[2] or "").split(".")):
        field = next((f for f in msgspec.structs.fields(kind) if f.name == step), None)
        parts = getattr(field and field.type, "__args__", (field and field.type,))
        kind = next((p for p in parts if isinstance(p, type) and issubclass(p, _Part)), None)
        if kind is None:
            return text
    place = f" in {found[2]}" if found[2] else ""
    names = ", ".join(kind.__struct_fields__)
    return f"there is no key {found[1]}{place}; there are {names}"


def check(file: DeployFile) -> None:
    """Raise ConfigError for keys that cannot work, alone or together."""
    for key in ("name", "namespace"):
        value = getattr(file, key)
        if not _NAME.fullmatch(value) or len(value) > NAME_LENGTH:
            raise ConfigError(
                f"{key}: {value!r}; use up to {NAME_LENGTH} lower-case letters, digits and "
                "hyphens, a letter first"
            )
    if not file.model.strip():
        raise ConfigError(f"model: it is empty; use a line such as `{EXAMPLE}`")
    _check_counts(file)
    _check_volumes(file)
    _check_together(file)
    _check_traces(file)
    if file.autoscale is not None:
        _check_autoscale(file, file.autoscale)


def _check_counts(file: DeployFile) -> None:
    least = {"replicas": 0, "gpus": 0, "context": 1, "hosts": 1, "drain": 0, "dollars": 0}
    for key, low in least.items():
        if getattr(file, key) < low:
            raise ConfigError(f"{key}: {getattr(file, key):g}; use {low} or more")
    if file.replicas and file.gpus:
        raise ConfigError("replicas and gpus: give one; with gpus the planner chooses the other")
    if file.gateway.pods < 1 or not 1 <= file.gateway.processes <= 128:
        raise ConfigError("gateway: use 1 pod or more, and 1 to 128 processes")
    if file.split is not None and min(file.split.prefill, file.split.decode) < 1:
        raise ConfigError("split: use 1 or more prefill and decode pods")


def _check_volumes(file: DeployFile) -> None:
    volumes = {"model_volume": file.model_volume, "cache_volume": file.cache_volume}
    for key, volume in volumes.items():
        if volume is not None and volume.size and not _SIZE.fullmatch(volume.size):
            raise ConfigError(f"{key}.size: {volume.size!r}; use a size such as 100Gi")
    unknown = set(file.resources) - {"cpu", "memory"}
    if unknown:
        raise ConfigError(f"resources: {', '.join(sorted(unknown))}; use cpu and memory")


def _check_together(file: DeployFile) -> None:
    if file.split is not None:
        _check_split(file)
    if file.hosts > 1 and file.pods == "machine":
        raise ConfigError("hosts and pods: machine: a replica that spans hosts has pods of its own")
    if file.hosts > 1 and not file.has_gpus:
        raise ConfigError("hosts: replicas without GPUs stay on one host; use hosts: 1")
    if not file.has_gpus and file.engine != "millrace":
        raise ConfigError(f"gpu: cpu and engine: {file.engine}; use engine: millrace")
    if file.engine == "sglang" and not file.image:
        raise ConfigError("image: name SGLang's, such as lmsysorg/sglang:TAG; none is known here")
    if file.monitoring == "google" and not file.on_google:
        raise ConfigError(f"monitoring: google on {file.platform}; use prometheus or none")
    if file.platform == "machine":
        _check_one_machine(file)
    if file.bench is not None and file.engine != "millrace":
        raise ConfigError("bench: its Job serves Millrace itself; with another engine run "
                          "`millrace bench serve` against the entry")  # fmt: skip


def _check_traces(file: DeployFile) -> None:
    if file.traces and not file.traces.startswith(("http://", "https://")):
        raise ConfigError(
            f"traces: {file.traces!r}; use a URL of OTLP over HTTP, such as "
            "http://collector.monitoring:4318/v1/traces"
        )
    if file.traces:
        try:
            parse_url(file.traces)
        except UserError as error:
            raise ConfigError(f"traces: {error}") from None
    if file.traces and file.engine == "sglang" and file.entry != "gateway":
        raise ConfigError("traces: of replicas of sglang only the gateway's; use entry: gateway")


def _check_one_machine(file: DeployFile) -> None:
    if file.entry != "gateway" or file.hosts > 1:
        raise ConfigError(
            "platform: machine has replicas behind a gateway; use entry: gateway and hosts: 1, or "
            "a cluster"
        )
    if file.api_key_secret:
        raise ConfigError("api_key_secret: a machine has no Secrets; put access: {api_key: [...]} "
                          "into its fleet.yaml")  # fmt: skip


def _check_split(file: DeployFile) -> None:
    if file.engine != "vllm":
        raise ConfigError(
            f"split: replicas of {file.engine} do not hand sequences over yet; use engine: vllm"
        )
    if file.entry != "inference-pool":
        raise ConfigError("split: what pairs prefill with decode is the pool's endpoint picker; "
                          "use entry: inference-pool")  # fmt: skip
    if file.platform == "gke-autopilot":
        raise ConfigError("split: Autopilot gives every GPU pod whole machines, so that pods of 2 "
                          "and 6 GPUs do not share one; use platform: gke-standard")  # fmt: skip
    if file.platform == "machine" or file.pods == "machine" or file.hosts > 1:
        raise ConfigError("split: its pods have GPUs of one host each; leave out pods and hosts, "
                          "and use a cluster")  # fmt: skip


def _check_schedule(schedule: SchedulePart, wanted: AutoscalePart) -> None:
    """KEDA reads no more than five fields, and says of a wrong one only that scaling failed."""
    for key in ("start", "end"):
        moment = getattr(schedule, key)
        if len(moment.split()) != 5:
            raise ConfigError(
                f"autoscale.schedules.{key}: {moment!r}; use minute, hour, day, month and weekday, "
                'such as "30 7 * * 1-5"'
            )
    if schedule.start.split() == schedule.end.split():
        raise ConfigError("autoscale.schedules: start and end are the same moment; use a later end")
    known = available_timezones()  # none where a system has no table of them
    if known and schedule.timezone not in known:
        raise ConfigError(
            f"autoscale.schedules.timezone: {schedule.timezone!r}; use a name such as Europe/Berlin"
        )
    if not 1 <= schedule.pods <= wanted.max:
        raise ConfigError(
            f"autoscale.schedules.pods: {schedule.pods}; use 1 to {wanted.max}, the fleet's max"
        )


def _check_autoscale(file: DeployFile, wanted: AutoscalePart) -> None:
    if not 0 <= wanted.min <= wanted.max or wanted.max < 1:
        raise ConfigError(
            f"autoscale: min {wanted.min}, max {wanted.max}; use 0 <= min <= max, and max 1 or more"
        )
    for schedule in wanted.schedules:
        _check_schedule(schedule, wanted)
    if file.platform == "machine":
        raise ConfigError("autoscale: a machine has the replicas that it has; use a cluster")
    if file.split is not None:
        raise ConfigError("autoscale: pods of a split have fixed numbers; leave one of both out")
    if file.entry == "gateway":
        return
    if file.entry == "inference-pool" and not wanted.prometheus and not wanted.schedules:
        raise ConfigError("autoscale.prometheus: with entry: inference-pool its address is needed; "
                          "give one such as http://prometheus.monitoring:9090")  # fmt: skip
    if wanted.prometheus and file.monitoring == "none":
        raise ConfigError("autoscale.prometheus: nobody reads the endpoint picker's metrics there; "
                          "use monitoring: prometheus too")  # fmt: skip
    if file.entry == "service" and not wanted.schedules:
        raise ConfigError("autoscale: a plain Service counts no requests; use entry: gateway, or "
                          "give schedules")  # fmt: skip
    if wanted.min < 1:
        raise ConfigError(
            f"autoscale.min: 0 with entry: {file.entry}: nothing there holds a request while no "
            "pod runs; use min: 1, or entry: gateway"
        )
