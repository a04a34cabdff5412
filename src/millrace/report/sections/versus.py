"""Other servers under the same load, by turns: each round starts every server once, in an order
that turns by one, and sends the same prompts with the same client.

The servers are started through the fleet's drivers, with the flags that their own projects
recommend for this family of models; those flags are printed and kept.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from millrace.errors import ConfigError
from millrace.fleet.device_assignment import visible_gpus
from millrace.fleet.drivers import Engine, engine_command
from millrace.report.sections.load import Load, batch_load, headline_load, send
from millrace.report.steps.profiles import Profile
from millrace.report.steps.step import ModelFacts, Place, Serving, Step

OURS = "millrace"
_LOADS = "headline"


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A server to compare with. options: in the names of `millrace serve`, which the driver
    translates; own: in the server's own words, vision_own: more of them
    for a checkpoint that can see; source: who recommends them. drafts: on a GPU."""

    name: str
    engine: Engine
    version: str
    source: str
    options: Mapping[str, Any] = {}
    own: tuple[str, ...] = ()
    vision_own: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    drafts: int = 0


PEERS = {
    one.name: one
    for one in (
        Peer(
            name="vllm",
            engine="vllm",
            version="0.33",
            source="vLLM's recipe for Qwen3.5-27B",
            own=("--reasoning-parser", "qwen3"),
            vision_own=("--language-model-only",),
            drafts=1,
        ),
        Peer(
            name="sglang",
            engine="sglang",
            version="0.5.23",
            source="SGLang's cookbook for Qwen3.5, state in bfloat16 as it publishes on H200",
            own=(
                *("--reasoning-parser", "qwen3", "--mamba-scheduler-strategy", "extra_buffer"),
                *("--mamba-ssm-dtype", "bfloat16"),
            ),
            environment={"SGLANG_ENABLE_SPEC_V2": "1"},
            drafts=3,
        ),
        Peer(
            name="sglang-replay",
            engine="sglang",
            version="0.5.23",
            source="the same with its replay of linear states, which needs them in float32",
            own=(
                *("--reasoning-parser", "qwen3", "--mamba-scheduler-strategy", "extra_buffer"),
                "--enable-linear-replayssm-spec",
            ),
            environment={"SGLANG_ENABLE_SPEC_V2": "1"},
            drafts=3,
        ),
    )
}
# What is asked for by one name.
GROUPS = {"vllm": ("vllm",), "sglang": ("sglang", "sglang-replay")}


def read_peers(text: str) -> list[str]:
    """The peers that a comma-separated list names. Raises ConfigError for an unknown one."""
    found: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in GROUPS and name not in PEERS:
            raise ConfigError(f"--versus {name}: use {', '.join(dict.fromkeys([*GROUPS, *PEERS]))}")
        found += [one for one in GROUPS.get(name, (name,)) if one not in found]
    return found


def peer_serving(
    name: str, model: ModelFacts, profile: Profile, *, program: str = "", more: str = ""
) -> Serving:
    """How a peer is started on this machine. program: where it is not on PATH; more: arguments in
    its own words, after ours. Raises ConfigError where it is not installed."""
    peer = PEERS[name]
    gpu = bool(visible_gpus())
    options: dict[str, Any] = {
        "served_model_name": [model.name],
        "max_model_len": profile.max_model_len,
        "max_num_seqs": profile.streams,
    }
    if gpu and model.drafts and peer.drafts:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": peer.drafts}
    own = [*peer.own, *(() if model.text_only else peer.vision_own)]
    environment = dict(peer.environment)
    if not gpu and peer.engine == "vllm":
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        options["dtype"] = "bfloat16"
    words = f"{shlex.join(own)} {more}".strip()
    command = engine_command(peer.engine, str(model.directory), options, own=words, program=program)
    return Serving(name=name, command=tuple(command), environment=tuple(environment.items()))


def versus_drafts() -> int:
    """Drafts of our own server: none where the others cannot have any."""
    return 1 if visible_gpus() else 0


def peer_line(name: str, serving: Serving) -> str:
    """What is printed of a peer before anything runs."""
    peer = PEERS[name]
    variables = " ".join(f"{key}={value}" for key, value in serving.environment)
    note = (
        ""
        if visible_gpus()
        else "; without drafts, which it has not on a CPU; so ours has none either"
    )
    return (
        f"{name} (flags for {peer.version}, from {peer.source}{note}): "
        f"{variables} {' '.join(serving.command)}".replace("  ", " ")
    )


def loads_of(profile: Profile, round_number: int) -> dict[str, Load]:
    """The loads of one round: headline, and texts at each number of streams."""
    seed = 1000 + round_number
    batches = {
        f"batch {streams}": batch_load(profile, streams, seed) for streams in profile.batches
    }
    return {_LOADS: headline_load(profile, seed), **batches}


def versus_steps(servings: Sequence[Serving], profile: Profile, rounds: int) -> list[Step]:
    """A step for each server of each round, in an order that turns by one."""
    turned = [
        (number, [*servings[number % len(servings) :], *servings[: number % len(servings)]])
        for number in range(rounds)
    ]
    return [_visit(serving, profile, number) for number, order in turned for serving in order]


def _visit(serving: Serving, profile: Profile, number: int) -> Step:
    loads = loads_of(profile, number)

    async def work(place: Place) -> Any:
        found = {}
        for name, load in loads.items():
            place.say(f"  {name}")
            found[name] = await send(load, place)
        return found

    # A server of its own for each visit: what an earlier round left behind favours nobody.
    own = msgspec.structs.replace(serving, name=f"versus-{serving.name}-{number + 1}")
    return Step(
        name=f"versus/{serving.name}/{number + 1}",
        section="versus",
        seconds=sum(load.tokens for load in loads.values()) / profile.rate + 10.0,
        work=work,
        command=("millrace", "report", "MODEL", "--sections", "versus"),
        serving=own,
    )
