"""The progress line of a run on the terminal, and the remarks after it."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from millrace.bench.load import messages
from millrace.bench.report.results import unexpected_hits
from millrace.bench.workload.prompts import Lengths, Workload, workload_line


class LiveProgress:
    """One line, drawn twice a second: progress, requests in flight, throughput, TTFT."""

    def __init__(self, *, hidden: bool, duration: float | None = None) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            disable=hidden or not console.is_terminal,
        )
        self._duration = duration
        self._total: int | None = None

    def start(self, workload: Workload, seen: Lengths) -> None:
        """Print the workload."""
        click.echo(workload_line(workload, seen), err=True)
        self._total = None if self._duration is not None else workload.count
        self._task = self._bar.add_task("", total=self._duration or self._total)

    def show(self, progress: messages.Progress) -> None:
        """Draw the progress."""
        if self._bar.disable:
            return
        if not self._bar.live.is_started:
            self._bar.start()
        completed = progress.seconds if self._duration is not None else progress.done
        self._bar.update(
            self._task,
            completed=completed,
            description=progress_line(progress, self._total),
            refresh=True,
        )

    def stop(self) -> None:
        if not self._bar.disable and self._bar.live.is_started:
            self._bar.stop()


def progress_line(progress: messages.Progress, total: int | None) -> str:
    """The text of the progress line. Its tok/s is the mean since the run's beginning: tokens of
    requests that end together, over the time since the line before, would be no rate at all."""
    rate = progress.tokens / progress.seconds if progress.seconds > 0 else 0.0
    done = f"{progress.done}/{total}" if total else str(progress.done)
    parts = [f"{done} done", f"{progress.in_flight} in flight", f"{rate:,.0f} tok/s"]
    if progress.timed:
        parts.append(f"TTFT mean {1e3 * progress.ttft_sum / progress.timed:,.0f} ms")
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    return ", ".join(parts)


def remarks(fields: dict[str, Any]) -> list[str]:
    """Lines that a reader of the table must know as well."""
    lines = []
    if fields["usage_missing"]:
        lines.append(
            f"{fields['usage_missing']} answers had no usage, or a part of it: chunks with text "
            "were counted as output tokens, and prompt tokens as they were sent"
        )
    if fields["from_due"] is not None and fields["client"]["p99_send_delay_ms"] > 1.0:
        due = fields["from_due"]
        lines.append(
            f"counted from when requests were due: TTFT median {due['median_ttft_ms']:.1f} ms, "
            f"p99 {due['p99_ttft_ms']:.1f} ms"
        )
    if (warning := unexpected_hits(fields)) is not None:
        lines.append(warning)
    client = fields["client"]
    if client["client_bound"]:
        lines.append(f"{client['advice']} ({'; '.join(client['reasons'])})")
    return [*lines, *fields["server"]["notes"]]
