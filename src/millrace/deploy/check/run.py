"""All checks of a cluster in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from millrace.deploy.check import (
    cluster_checks,
    entry_checks,
    google_checks,
    machine_checks,
    storage_checks,
)
from millrace.deploy.check.cluster import Cluster, NotAllowedError
from millrace.deploy.layout.layout import Layout
from millrace.doctor.finding import Finding

Check = Callable[[Cluster, Layout], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    cluster_checks.version,
    cluster_checks.names,
    cluster_checks.custom_resources,
    cluster_checks.controllers,
    cluster_checks.namespace,
    machine_checks.gpus,
    machine_checks.plugin,
    machine_checks.quotas,
    machine_checks.compute_class,
    storage_checks.storage,
    storage_checks.download,
    cluster_checks.images,
    entry_checks.entry,
)


def check_cluster(cluster: Cluster, layout: Layout) -> list[Finding]:
    """What is there and what is missing, each with the command that mends it."""
    found: list[Finding] = []
    for check in CHECKS:
        found += _allowed(check, cluster, layout)
    return [*found, *google_checks.google(layout)]


def _allowed(check: Check, cluster: Cluster, layout: Layout) -> list[Finding]:
    """The findings; of what may not be read, one that says so."""
    found: list[Finding] = []
    try:
        found.extend(check(cluster, layout))
    except NotAllowedError as error:
        name = check.__name__.replace("_", " ")
        found.append(Finding("access", name, f"these credentials may not read {error}", "warn",
                             "kubectl auth can-i --list"))  # fmt: skip
    return found
