"""Flags of `millrace tune` that cannot work, alone or together: one line for the first of them.

What depends on the machine, the model or the search space is checked where that is known.
"""

from __future__ import annotations

import shlex
import shutil
from typing import get_args

from millrace.bench.runs.options_from_flags import read_objectives
from millrace.common.http_client import parse_base_url
from millrace.errors import ConfigError
from millrace.hardware.gpus import gpu
from millrace.plan.facts.texts import text
from millrace.tasks import TASKS
from millrace.tune.options import PlannedEngine, TuneFlags

_ONE_OR_MORE = ("trials", "finalists", "least_rounds", "full_runs")
_NOT_NEGATIVE = (
    "draft_rounds", "anchor_every", "minutes", "spread_penalty", "accuracy_items", "max_itl_p99_ms",
)  # fmt: skip
_POSITIVE = ("start_timeout", "hang_timeout", "price")
_SHARES = ("max_failed", "max_accuracy_drop", "min_accuracy")


def check_flags(flags: TuneFlags) -> None:
    """Raises ConfigError for the first flag that cannot work."""
    _check_numbers(flags)
    if flags.most_rounds < flags.least_rounds:
        raise ConfigError(
            f"--most-rounds {flags.most_rounds}: use --least-rounds ({flags.least_rounds}) or more"
        )
    text(flags.plan_text)
    if flags.accuracy_items and flags.accuracy not in TASKS:
        raise ConfigError(f"--accuracy {flags.accuracy}: use one of {', '.join(TASKS)}")
    _check_objective(flags)
    _check_server(flags)


def check_plan_only(flags: TuneFlags) -> None:
    """As check_flags, for what the planner alone is asked."""
    if flags.engine not in get_args(PlannedEngine):
        known = ", ".join(get_args(PlannedEngine))
        raise ConfigError(f"--engine {flags.engine}: the planner knows {known}")
    if flags.gpus is not None and flags.gpus < 1:
        raise ConfigError(f"--gpus {flags.gpus}: use 1 or more")
    if flags.plan_gpu is not None:
        gpu(flags.plan_gpu)


def _check_numbers(flags: TuneFlags) -> None:
    for name in (*_ONE_OR_MORE, *_NOT_NEGATIVE, *_POSITIVE, *_SHARES, "short_share"):
        value = getattr(flags, name)
        if value is None:
            continue
        if name in _ONE_OR_MORE:
            fine, use = value >= 1, "1 or more"
        elif name in _NOT_NEGATIVE:
            fine, use = 0 <= value < float("inf"), "0 or more"
        elif name in _POSITIVE:
            fine, use = 0 < value < float("inf"), "above 0"
        elif name in _SHARES:
            fine, use = 0 <= value <= 1, "0 to 1"
        else:
            fine, use = 0 < value <= 1, "above 0, to 1"
        if not fine:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: use {use}")


def _check_objective(flags: TuneFlags) -> None:
    read_objectives(flags.goodput)
    if flags.objective == "goodput" and not flags.goodput:
        raise ConfigError("--objective goodput needs limits: give --goodput ttft:MS, tpot:MS")
    if flags.objective != "goodput" and (flags.goodput or flags.max_itl_p99_ms):
        flag = "--goodput" if flags.goodput else "--max-itl-p99-ms"
        raise ConfigError(f"{flag} counts for goodput alone: give --objective goodput too")
    if flags.objective == "per_dollar" and flags.price is None and flags.plan_gpu is None:
        raise ConfigError("--objective per_dollar needs --price, or --plan-gpu for the table's")


def _check_server(flags: TuneFlags) -> None:
    if (flags.base_url is None) != (flags.restart_command is None):
        raise ConfigError("--base-url and --restart-command go together: give both, or neither")
    if flags.base_url is not None:
        parse_base_url(flags.base_url)
    elif flags.log_file is not None:
        raise ConfigError("--log-file is of a server that runs elsewhere: give --base-url too")
    if flags.engine_command is not None:
        _check_program(flags.engine_command)


def _check_program(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--engine-command {command!r}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"--engine-command {command!r}: no such program; give its path")
