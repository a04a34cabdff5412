"""The options of `millrace report`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

NAMED = "run"  # the command that `millrace report MODEL` is short for


class _ReportGroup(click.Group):
    """`millrace report MODEL ...` is `millrace report run MODEL ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = [NAMED, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ReportGroup)
def report() -> None:
    """Measure a model on this machine, in one file that can be checked: `millrace report MODEL`."""


@report.command(NAMED)
@click.argument("model")
@click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path, file_okay=False),
    help="Where the report and its steps are kept.  [default: report-MODEL]",
)  # fmt: skip
@click.option("--profile", help="How large everything is: full, small or smoke.  [by the device]")
@click.option("--sections", help="Some of the sections, with commas between them.  [all]")
@click.option("--dry-run", is_flag=True, help="Print the steps and the time they take; run none.")
@click.option("--versus", default="", help="Also measure these servers, by turns: vllm,sglang.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of --versus.  [by the profile]")
@click.option("--vllm-command", default="", help="The program, where `vllm` is not on PATH.")
@click.option("--vllm-args", default="", help="More arguments of vLLM, in its own words.")
@click.option("--sglang-command", default="", help="As --vllm-command, for SGLang.")
@click.option("--sglang-args", default="", help="More arguments of SGLang, in its own words.")
@click.option("--lm-eval-command", default="", help="The program, where lm_eval is not installed.")
@click.option("--lm-eval-tasks", default="gsm8k", show_default=True, help="Of local-completions.")
@click.option(
    "--lm-eval-chat-tasks", default="ifeval", show_default=True, help="Of local-chat-completions."
)
@click.option("--lm-eval-limit", type=click.IntRange(1), default=200, show_default=True,
              help="Items of each of these tasks.")  # fmt: skip
@click.option("--lm-eval-include-path", help="A folder with more tasks for lm_eval.")
@click.option("--start-timeout", type=click.FloatRange(1.0), default=1800.0, show_default=True,
              help="Seconds that a server has to start.")  # fmt: skip
def run_command(model: str, serve_arguments: tuple[str, ...], **options: Any) -> None:
    """Measure MODEL, step by step.

    Nothing that is done is lost when it is killed: the same command goes on. All arguments after
    `--` are passed on to every start of `millrace serve`. The exit status is 1 if a step failed.
    """
    from millrace.report.request import run_report

    status = run_report(model, serve_arguments, options)
    if status:
        raise click.exceptions.Exit(status)


@report.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A model directory: are its files those that were measured?",
)  # fmt: skip
def verify(file: Path, model: Path | None) -> None:
    """Check a report.json: hashes, totals against parts, grades against answers, the summary.

    An HTML file of the same name beside it must be of the same report. The exit status is 1 if
    anything is wrong.
    """
    from millrace.report.verify import findings, read_report, remarks

    found = read_report(file)
    page = file.with_suffix(".html")
    text = page.read_text(encoding="utf-8") if page.is_file() else None
    wrong = findings(found, model=model, page=text)
    for line in wrong:
        click.echo(f"wrong: {line}")
    for line in remarks(found):
        click.echo(line)
    click.echo(f"{len(wrong)} findings" if wrong else f"whole: sha256 {found.sha256}")
    if wrong:
        raise click.exceptions.Exit(1)


@report.command()
def schema() -> None:
    """Print the JSON schema of a report.json."""
    from millrace.report.steps.document import Report

    click.echo(msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Report))).decode())
