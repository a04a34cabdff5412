"""`millrace plan`: the best settings for a load, and what they do and cost, with error bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from millrace.errors import ConfigError
from millrace.plan import options as o

NAMED = "for"  # the command that `millrace plan MODEL` is short for


class _Plan(click.Group):
    """`millrace plan MODEL ...` is `millrace plan for MODEL ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = [NAMED, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Plan)
def plan() -> None:
    """What a fleet will do and cost, with error bars: `millrace plan MODEL --gpu h200 ...`."""


@plan.command(NAMED)
@click.argument("model")
@click.option("--gpu", "kinds", multiple=True, required=True, help="GPUs to choose from, or all.")
@click.option("--gpus", "count", type=int, default=1, show_default=True, help="How many, at most.")
@o.load_options
@click.option("--objective", type=click.Choice(["throughput", "latency", "cost"]),
              default="throughput", show_default=True, help="What is best.")  # fmt: skip
@click.option("--max-ttft-ms", type=float, default=0.0, help="Limit of the TTFT.")
@click.option("--max-tpot-ms", type=float, default=0.0, help="Limit of the TPOT.")
@click.option("--max-itl-p99-ms", type=float, default=0.0, help="Limit of the ITL's p99.")
@click.option("--min-user-tok-s", type=float, default=0.0, help="What a user gets at least.")
@click.option("--weights", multiple=True, default=("fp8",), help="Formats that may be chosen.")
@click.option("--drafts", multiple=True, type=int, help="Numbers of drafts that may be chosen.")
@click.option("--tensor-parallel-size", "ranks", multiple=True, type=int,
              help="Numbers of ranks that may be chosen.")  # fmt: skip
@click.option("--max-num-seqs", "sequences", multiple=True, type=int,
              help="Numbers of sequences that may be chosen.")  # fmt: skip
@click.option("--state", "states", multiple=True, help="Formats of states that may be chosen.")
@o.engine_options
@o.price_options
@o.output_options
def choose_command(model: str, as_json: bool, html: Path | None, **given: Any) -> None:
    """The best settings for a load, why others lost, and how to start them."""
    from millrace.plan.facts.prices import price_of
    from millrace.plan.predict.choice import Slo, Space, choose
    from millrace.plan.predict.cost import against, cost
    from millrace.plan.predict.prediction import Planner
    from millrace.plan.text_report import console, print_choice, print_cost

    planner, load = Planner(o.known(given["calibration"])), o.load_of(given)
    limited = {name: given[name] for name in ("drafts", "ranks", "sequences", "states")}
    space = Space(
        gpus=o.kinds_of(given["kinds"]), count=_positive(given["count"], "--gpus"),
        weights=given["weights"], engine=given["engine"], utilization=given["utilization"],
        max_model_len=given["max_model_len"], **{k: v for k, v in limited.items() if v},
    )  # fmt: skip
    slo = Slo(given["max_ttft_ms"], given["max_tpot_ms"], given["max_itl_p99_ms"],
              given["min_user_tok_s"])  # fmt: skip

    def price(name: str) -> float:
        return price_of(name, given["price_kind"], given["price"]).dollars

    found = choose(planner, model, load, space, slo, given["objective"], price)
    best = found.best.prediction
    costs, rows = None, []
    if found.best.dollars:
        costs = cost(best, price(best.deployment.description.gpu), given["busy"])
        rows = against(costs, load.input / (load.input + load.output))
    if html is not None:
        _write_html(html, planner, found)
    if as_json:
        _print_json({"choice": found, "cost": costs, "against": rows})
        return
    print_choice(console(), found)
    if costs is not None:
        print_cost(console(), costs, rows)


def _write_html(path: Path, planner: Any, found: Any) -> None:
    from millrace.plan.explain import decode_parts
    from millrace.plan.html_report import page

    text = page(found, decode_parts(planner, found.best.prediction))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}") from None


def _print_json(content: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(content, enc_hook=float)).decode())


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ConfigError(f"{name} {value}: use 1 or more")
    return value


# --- other commands -----------------------------------------------------------------------------


@plan.command("explain")
@click.argument("model")
@o.settings_options
@click.option("--rows", type=float, default=64, show_default=True, help="Sequences that decode.")
@click.option("--context", type=float, default=1024, show_default=True, help="Tokens of each.")
@click.option("--prompt-tokens", type=float, default=0, help="Prompt tokens in the same step.")
@o.engine_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain_command(model: str, as_json: bool, **given: Any) -> None:
    """Where a step's time goes, and what each parameter rests on."""
    from millrace.plan.explain import explain, print_explanation

    found = explain(model, given, o.known(given["calibration"]))
    if as_json:
        _print_json(found)
    else:
        print_explanation(found)


@plan.command("hand-over")
@click.argument("model")
@o.settings_options
@click.option("--prompts", default="1024,8192,32768", show_default=True, help="Tokens of prompts.")
@click.option("--outputs", default="64,256,1024", show_default=True, help="Tokens of answers.")
@click.option("--states", default="fp32,bf16", show_default=True, help="Formats of states.")
@click.option("--links", default="1.2,12,48", show_default=True, help="GB/s between replicas.")
@click.option("--gpus", type=int, default=8, show_default=True, help="Of all replicas.")
@click.option("--rows", type=int, default=64, show_default=True, help="Sequences that decode.")
@o.engine_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def hand_over_command(model: str, as_json: bool, **given: Any) -> None:
    """When it pays that one replica computes prompts and another answers them."""
    from millrace.plan.explain import description_of
    from millrace.plan.hand_over import Cases, print_table, table

    cases = Cases(
        o.listed(given["prompts"], int, "--prompts"),
        o.listed(given["outputs"], int, "--outputs"),
        o.listed(given["states"], str, "--states"),
        o.listed(given["links"], float, "--links"),
        given["gpus"], given["rows"],
    )  # fmt: skip
    description = description_of(model, given)
    rows = table(description, cases, o.known(given["calibration"]))
    if as_json:
        _print_json(rows)
    else:
        print_table(description, cases, rows)


@plan.command("calibrate")
@click.argument("results", nargs=-1, required=True, type=o.FILE)
@click.option("--model", required=True, help="The model that was measured.")
@o.settings_options
@o.engine_options
@click.option("--text", default="mixed", show_default=True, help="Text of the results' runs.")
@click.option("--out", type=o.FILE, required=True, help="Where to write the calibration.")
@click.option("--step-model", type=o.FILE, help="Also write a step model, for the simulator.")
def calibrate_command(results: tuple[Path, ...], model: str, **given: Any) -> None:
    """Fit the step model to plan logs, forward pass metrics, or results of the benchmark."""
    from millrace.plan.calibration.observations import read
    from millrace.plan.calibration.refit import refit, step_model_of
    from millrace.plan.explain import description_of

    description = description_of(model, given)
    seen = [one for path in results for one in read(path, given["text"])]
    found = refit(description, seen, o.known(given["calibration"]))
    _write(given["out"], msgspec.json.format(msgspec.json.encode(found)), "--out")
    if given["step_model"] is not None:
        step_model_of(found).save(given["step_model"])
    click.echo(
        f"{found.observations} steps and runs in {len(seen)} groups: median error "
        f"{found.error:.1%}, {found.before:.1%} before; written to {given['out']}"
    )


def _write(path: Path, content: bytes, name: str) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{name} {path}: {error.strerror}") from None


@plan.command("capacity")
@click.option("--preset", type=click.Choice(["write-up"]), default="write-up", show_default=True,
              help="Nodes of eight GPUs, Qwen3.5-27B in FP8, 2,000 policies at once.")  # fmt: skip
@click.option("--engine", type=click.Choice(["millrace", "vllm"]), default="vllm",
              show_default=True, help="Engine of the replicas.")  # fmt: skip
@click.option("--gpu", default="b200", show_default=True, help="GPU of the nodes.")
@click.option("--price", type=float, help="Dollars a GPU-hour.")
@click.option("--price-kind", type=click.Choice(["on-demand", "reserved", "spot", "flex"]),
              help="Kind of price in the table.")  # fmt: skip
@click.option("--batch", type=float, default=50_000, show_default=True,
              help="Policies of a batch on one node.")  # fmt: skip
@click.option("--peak", type=float, default=40, show_default=True,
              help="Requests a second in the busiest hour of a day.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def capacity_command(preset: str, as_json: bool, **given: Any) -> None:
    """Nodes to users, requests and tokens; a batch; a day that scales to zero."""
    from millrace.plan.fleet_report import fleet, print_fleet

    found = fleet(given["engine"], given["gpu"], given["batch"], given["peak"],
                  given["price_kind"], given["price"])  # fmt: skip
    if as_json:
        _print_json(found)
    else:
        print_fleet(found)


@plan.command("accuracy")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def accuracy_command(as_json: bool) -> None:
    """Every measured row that the planner knows, beside what it says of it."""
    from millrace.plan.calibration.holdout import explained
    from millrace.plan.text_report import console, print_accuracy

    rows = explained()
    if as_json:
        _print_json(rows)
    else:
        print_accuracy(console(), rows)


@plan.command("gpus")
def gpus_command() -> None:
    """The GPUs that are known: dense rates, bandwidth, memory, power, lowest price."""
    from millrace.plan.fleet_report import print_gpus

    print_gpus()
