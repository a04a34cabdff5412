"""The `millrace` command. Each subcommand is imported only when it is called.

So `--help` is quick, and the gateway and the benchmark never load PyTorch. Whatever the user got
wrong ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from millrace.about import describe, unsupported_system
from millrace.common.safe_log import open_standard_descriptors
from millrace.errors import UserError

# name -> (module, attribute, what it does)
_COMMANDS = {
    "serve": ("millrace.server.command", "serve", "Serve a model over an OpenAI-compatible API."),
    "chat": ("millrace.chat.command", "chat", "Talk with a model in the terminal."),
    "gateway": ("millrace.gateway.command", "gateway", "Put one address before many replicas."),
    "fleet": ("millrace.fleet.command", "fleet", "Run replicas of this host from one file."),
    "batch": ("millrace.offline.batch", "batch", "Answer a file of requests, each exactly once."),
    "deploy": (
        "millrace.deploy.command",
        "deploy",
        "Render, check and follow a fleet on a cluster.",
    ),
    "bench": ("millrace.offline.command", "bench", "Measure servers and engines."),
    "observe": (
        "millrace.observe.command",
        "observe",
        "Sample a fleet; keep it; say where the wall is.",
    ),
    "simulate": (
        "millrace.simulate.command",
        "simulate",
        "Simulate a fleet on a virtual clock.",
    ),
    "eval": ("millrace.eval.command", "eval_command", "Measure a model's accuracy."),
    "report": (
        "millrace.report.command",
        "report",
        "Measure a model on this machine, in a file that can be checked.",
    ),
    "download": ("millrace.download.command", "download", "Download a model, and check it."),
    "quantize": ("millrace.quantize.command", "quantize", "Write a quantized checkpoint."),
    "tune": ("millrace.tune.command", "tune", "Find the settings that serve a load best."),
    "plan": ("millrace.plan.command", "plan", "What a fleet will do and cost, with error bars."),
    "doctor": ("millrace.doctor.command", "doctor", "Look at what a machine can do."),
}


class _Commands(click.Group):
    """A group that knows its commands by name and summary, and loads the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, row[2]) for name, row in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise _CommandError(
                f"{ctx.command_path} {ctx.invoked_subcommand}", str(error)
            ) from error


class _CommandError(Exception):
    """Something the user gave cannot work: which command says so, and what."""

    def __init__(self, command: str, message: str) -> None:
        super().__init__(message)
        self.command = command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, wanted: _show_version(ctx) if wanted else None,
    help="Show the version, with its commit, torch and the device, and exit.",
)
def cli() -> None:
    """Serve Qwen3.5-class models, on one device or on a fleet, and measure it."""


def _show_version(ctx: click.Context) -> None:
    click.echo(describe())
    ctx.exit()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    open_standard_descriptors()
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's). Returns the exit status."""
    if problem := unsupported_system():
        return _complain("millrace", problem)
    try:
        status = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="millrace",
            standalone_mode=False,
        )
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _complain(_command_path(error), error.format_message())
    except _CommandError as error:
        return _complain(error.command, str(error))
    except (click.Abort, KeyboardInterrupt):
        return 130
    return status if isinstance(status, int) else 0


def _command_path(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "millrace"


def _complain(command: str, message: str) -> int:
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
