"""A rollout that is followed: what is said of it, and when the waiting ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.cli import run
from millrace.deploy.check.cluster import Cluster
from millrace.deploy.check.status import PATIENCE, follow
from millrace.deploy.layout.layout import Layout
from millrace.errors import UserError
from tests.deploy.fake_cluster import FakeCluster, fake_cluster
from tests.deploy.healthy import false, put_pod, true
from tests.deploy.variants import layout

LAYOUT = layout("gateway")
SPACE = LAYOUT.file.namespace


class Rollout:
    """A fleet that comes up; `steps` are what happens at each look, one after the other."""

    def __init__(self, cluster: FakeCluster, kubeconfig: str) -> None:
        self.cluster, self._kubeconfig = cluster, kubeconfig
        self.steps: list[Callable[[], None]] = []
        self.said: list[str] = []
        self.now = 0.0
        self.workload(LAYOUT.gateway_name, 1, 1)

    def workload(self, name: str, ready: int, wanted: int, **status: Any) -> None:
        counts = {"replicas": wanted, "updatedReplicas": wanted, "readyReplicas": ready}
        self.cluster.put("Deployment", name, SPACE, spec={"replicas": wanted},
                         status={**counts, **status})  # fmt: skip

    def follow(self, found: Layout = LAYOUT, timeout: float = 3600.0) -> list[str]:
        real = Cluster(kubeconfig=self._kubeconfig)
        try:
            follow(real, found, self.said.append, timeout=timeout, sleep=self._sleep,
                   clock=lambda: self.now)  # fmt: skip
        finally:
            real.close()
        return self.said

    def _sleep(self, _: float) -> None:
        self.now += 60.0
        if self.steps:
            self.steps.pop(0)()


@pytest.fixture
def rollout(tmp_path: Path) -> Iterator[Rollout]:
    with fake_cluster(tmp_path) as (cluster, kubeconfig):
        yield Rollout(cluster, kubeconfig)


def pod(rollout: Rollout, *, ready: bool = False, **state: Any) -> None:
    put_pod(rollout.cluster, LAYOUT, "replica-1", ready=ready, **state)


def test_what_changes_is_said_once_until_all_is_ready(rollout: Rollout) -> None:
    name = LAYOUT.replica_name
    rollout.workload(name, 2, 3)
    pod(rollout, state={"running": {}})

    def done() -> None:
        rollout.workload(name, 3, 3)
        pod(rollout, ready=True)

    rollout.steps = [lambda: None, done]
    assert rollout.follow() == [
        f"{name}: 2 of 3 ready",
        f"{LAYOUT.gateway_name}: 1 of 1 ready",
        "  replica-1: it runs and is not ready yet: it loads, and at the first time compiles",
        f"{name}: 3 of 3 ready",
    ]


OUT_OF_MEMORY = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}},
     "its image cannot be pulled: no such tag"),
    ({"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 4,
      "lastState": {"terminated": {"exitCode": 2}}},
     "status 2, an option is wrong: its log's last line says which, 4 times"),
    ({"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 3,
      "lastState": OUT_OF_MEMORY},
     "it used more memory than its limit, 3 times"),
    ({"state": {"waiting": {"reason": "CreateContainerConfigError"}}},
     "a Secret or ConfigMap that it names does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "words"), BROKEN, ids=["image", "option", "memory", "secret"])
def test_a_pod_that_stays_broken_ends_the_waiting(
    state: dict[str, Any], words: str, rollout: Rollout
) -> None:
    rollout.workload(LAYOUT.replica_name, 0, 3)
    pod(rollout, **state)
    with pytest.raises(UserError, match="replica-1 stays as it is") as error:
        rollout.follow()
    assert words in str(error.value)
    assert PATIENCE <= rollout.now < 2 * PATIENCE


def test_a_pod_that_recovers_in_time_is_waited_for(rollout: Rollout) -> None:
    rollout.workload(LAYOUT.replica_name, 0, 3)
    pod(rollout, **BROKEN[0][0])
    rollout.steps = [
        lambda: pod(rollout, state={"running": {}}),
        lambda: pod(rollout, **BROKEN[0][0]),
        lambda: rollout.workload(LAYOUT.replica_name, 3, 3),
    ]
    assert f"{LAYOUT.replica_name}: 3 of 3 ready" in rollout.follow()


def test_a_pod_without_a_machine_says_what_the_scheduler_says(rollout: Rollout) -> None:
    rollout.workload(LAYOUT.replica_name, 0, 3)
    pod(rollout)
    unscheduled = false("PodScheduled", "Unschedulable", "0/4 nodes: insufficient GPUs")
    rollout.cluster.change("Pod", "replica-1", SPACE, status={"conditions": [unscheduled]})
    with pytest.raises(UserError, match=r"not done after 600 s: .*0 of 3 ready"):
        rollout.follow(timeout=600.0)
    assert "  replica-1: no machine takes it yet: 0/4 nodes: insufficient GPUs" in rollout.said


def test_a_controller_that_gave_up_ends_the_waiting(rollout: Rollout) -> None:
    late = false("Progressing", "ProgressDeadlineExceeded")
    rollout.workload(LAYOUT.replica_name, 1, 3, conditions=[late])
    with pytest.raises(UserError, match="1 of 3 ready, and no more came in time"):
        rollout.follow()


def test_old_pods_are_not_the_new_ones(rollout: Rollout) -> None:
    """All ready, and one of them of the former version."""
    rollout.workload(LAYOUT.replica_name, 3, 3, updatedReplicas=2)
    rollout.steps = [lambda: rollout.workload(LAYOUT.replica_name, 3, 3)]
    rollout.follow()
    assert rollout.now == 60.0


def test_groups_are_counted_as_groups(rollout: Rollout) -> None:
    hosts = layout("hosts")
    space = hosts.file.namespace
    counts = {"replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}
    rollout.cluster.put("Deployment", hosts.gateway_name, space, spec={"replicas": 1},
                        status=counts)  # fmt: skip
    status = {"readyReplicas": 2, "updatedReplicas": 2, "conditions": [true("Available")]}
    rollout.cluster.put("LeaderWorkerSet", hosts.replica_name, space, spec={"replicas": 2},
                        status=status)  # fmt: skip
    assert f"{hosts.replica_name}: 2 of 2 ready" in rollout.follow(hosts)


def test_the_command_says_what_to_apply_where_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_cluster(tmp_path) as (_, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", kubeconfig)
        file = tmp_path / "deploy.yaml"
        file.write_text("model: millrace-mini\ngpu: cpu\n")
        assert run(["deploy", "status", str(file), "--once"]) == 2
    assert "kubectl apply -k overlays/plain starts it" in capsys.readouterr().err
