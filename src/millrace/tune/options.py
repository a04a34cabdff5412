"""The flags of `millrace tune`: names, types, defaults, help."""

from __future__ import annotations

from typing import Literal

from millrace.bench.flags.help_texts import HELP as LOAD_HELP
from millrace.bench.flags.structs import LoadFlags
from millrace.tune.trials.outcome import Objective

PlannedEngine = Literal["millrace", "vllm", "sglang"]


class TuneFlags(LoadFlags, frozen=True, kw_only=True):
    """A server to tune, the load on it, and what counts."""

    num_prompts: int | None = 256
    max_concurrency: int | None = 32
    ignore_eos: bool = True
    num_warmups: int = 8
    engine: str = "millrace"
    engine_command: str | None = None
    base_url: str | None = None
    restart_command: str | None = None
    log_file: str | None = None
    served_model_name: str | None = None
    space: str | None = None
    set: list[str] = []  # noqa: RUF012, a Struct copies it
    try_first: list[str] = []  # noqa: RUF012, a Struct copies it
    only: list[str] = []  # noqa: RUF012, a Struct copies it
    plan_gpu: str | None = None
    plan_model: str | None = None
    plan_text: str = "mixed"
    objective: Objective = "throughput"
    goodput: list[str] = []  # noqa: RUF012, a Struct copies it
    max_itl_p99_ms: float = 0.0
    price: float | None = None
    trials: int = 25
    minutes: float = 0.0
    short_share: float = 0.25
    finalists: int = 2
    least_rounds: int = 3
    most_rounds: int = 6
    full_runs: int = 2
    draft_rounds: int = 2
    anchor_every: int = 6
    spread_penalty: float = 1.0
    accuracy: str = "math"
    accuracy_items: int = 50
    max_accuracy_drop: float = 0.03
    min_accuracy: float | None = None
    max_failed: float = 0.0
    start_timeout: float = 900.0
    hang_timeout: float = 120.0
    dir: str = "tune-results"


HELP = {
    **LOAD_HELP,
    "seed": "Of prompts and of the search; every visit has prompts of its own.",
    "gpus": "GPUs to use (default: those of this host).",
    "engine": "millrace, vllm or sglang; another name needs --space and --engine-command.",
    "engine_command": "Program of the engine, if it is not on PATH.",
    "base_url": "Tune the server that runs there, with --restart-command.",
    "restart_command": "Shell command that restarts it; {flags} becomes the flags to try.",
    "log_file": "File that this server writes, to tell its failures apart.",
    "served_model_name": "Model to name in requests (default: the first that is listed).",
    "space": "YAML file with the knobs (default: the engine's).",
    "set": "NAME=VALUE: a knob that keeps this value.",
    "try_first": "NAME=VALUE,NAME=VALUE: settings to try before the search.",
    "only": "Knobs that are tuned; the others keep their defaults.",
    "plan_gpu": "GPU for which the planner is asked for first settings (default: this host's).",
    "plan_model": "Model by the planner's name or directory (default: MODEL).",
    "plan_text": "Kind of text for the planner, which decides how drafts fare.",
    "objective": "What is to be largest: tok/s, tok/s a GPU, tokens a dollar, or requests a second "
    "within --goodput.",
    "goodput": "ttft:MS, tpot:MS or e2el:MS, which a request must meet to count.",
    "max_itl_p99_ms": "A run whose p99 of the ITL is longer has no goodput; 0: no limit.",
    "price": "Dollars a GPU-hour (default: the planner's table for --plan-gpu).",
    "trials": "Settings to try, the defaults among them.",
    "minutes": "Start no further trial after so many minutes of visits; 0: no limit.",
    "short_share": "Part of the load that a short run has.",
    "finalists": "Trials that run again and again in turn with the defaults.",
    "least_rounds": "Rounds of the finalists at least.",
    "most_rounds": "Rounds at most, while they cannot be told apart.",
    "full_runs": "Loads for each start of a finalist; the second one finds warm caches.",
    "draft_rounds": "Rounds of the best settings with every number of drafts, few requests in "
    "flight and many, for a schedule by batch size; 0: none is made.",
    "anchor_every": "Trials between two runs of the defaults, which show drift; 0: never.",
    "spread_penalty": "Share of the spread between rounds that is taken off a median.",
    "accuracy": "Task of `millrace eval` that every trial is measured on.",
    "accuracy_items": "Its items; 0: accuracy is not measured, and the report says so.",
    "max_accuracy_drop": "Share by which accuracy may be below the defaults', beyond chance.",
    "min_accuracy": "Accuracy that every setting must have.",
    "max_failed": "Share of requests that may fail before a setting is given up.",
    "start_timeout": "Seconds until a server must be healthy.",
    "hang_timeout": "Seconds without a token after which a server counts as hung.",
    "dir": "Directory of the study: journal, logs, report.",
}
