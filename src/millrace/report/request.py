"""From the command line to a request: checked, and said before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from millrace.errors import ConfigError
from millrace.model_lookup import find_model
from millrace.report.plan import SECTIONS, Request, model_facts, read_sections, steps_of
from millrace.report.run import estimate, make_report, say
from millrace.report.sections.accuracy import Harness
from millrace.report.sections.versus import PEERS, peer_line, peer_serving, read_peers
from millrace.report.steps.profiles import PROFILES, Profile, default_profile, fitted
from millrace.report.steps.step import ModelFacts, Serving


def run_report(model: str, serve_arguments: Sequence[str], options: Mapping[str, Any]) -> int:
    """Make a report, or say what it would do; the exit status. Raises UserError."""
    request = read_request(model, serve_arguments, options)
    directory = options["directory"] or Path(f"report-{request.model.name}")
    for serving in request.peers:
        say(peer_line(serving.name, serving))
    if options["dry_run"]:
        click.echo(planned(request))
        return 0
    return make_report(request, directory, start_limit=options["start_timeout"])


def read_request(model: str, serve_arguments: Sequence[str], options: Mapping[str, Any]) -> Request:
    """What a command line asks for; says which profile that is. Raises UserError."""
    facts = model_facts(model, find_model(model).resolve())
    profile = _profile(options["profile"], facts)
    peers = read_peers(options["versus"])
    servings = [_peer(name, facts, profile, options) for name in peers]
    return Request(
        model=facts,
        profile=profile,
        sections=read_sections(options["sections"], versus=bool(peers)),
        serve_arguments=tuple(serve_arguments),
        peers=servings,
        rounds=options["rounds"] or profile.rounds,
        harness=Harness(
            command=options["lm_eval_command"],
            completions=_names(options["lm_eval_tasks"]),
            chat=_names(options["lm_eval_chat_tasks"]),
            limit=options["lm_eval_limit"],
            include=options["lm_eval_include_path"],
        ),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _profile(name: str | None, facts: ModelFacts) -> Profile:
    if name is not None and name not in PROFILES:
        raise ConfigError(f"--profile {name}: use {', '.join(PROFILES)}")
    chosen, why = (PROFILES[name], "as asked for") if name else default_profile()
    profile = fitted(chosen, facts.longest)
    say(f"profile {profile.name} ({why}): {profile.says}")
    if profile is not chosen:
        say(f"its lengths are cut to the {facts.longest} tokens that the model takes")
    return profile


def _peer(name: str, facts: ModelFacts, profile: Profile, options: Mapping[str, Any]) -> Serving:
    engine = PEERS[name].engine
    return peer_serving(
        name, facts, profile,
        program=options[f"{engine}_command"], more=options[f"{engine}_args"],
    )  # fmt: skip


def planned(request: Request) -> str:
    """The steps and the time that they take, a line for each."""
    steps = steps_of(request)
    lines = [f"{request.model.name}, profile {request.profile.name}:"]
    for section in request.sections:
        own = [step for step in steps if step.section == section]
        seconds = sum(step.seconds for step in own)
        lines.append(f"{section} ({SECTIONS[section]}): {len(own)} steps, about {seconds:.0f} s")
        lines += [f"  {step.name}: {' '.join(step.command)}" for step in own]
    found = estimate(steps, request)
    lines.append(
        f"{len(steps)} steps and {found.starts} starts of servers, about {found} "
        "(estimated from sizes, not measured)"
    )
    return "\n".join(lines)
