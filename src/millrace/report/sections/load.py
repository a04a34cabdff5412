"""Steps that put a load on a server: headline and write-up, batches, long prompts, prefix hits,
drafts by kind of text.

Every load is the flags of `millrace bench serve`, so that anybody can send it again. The report
keeps a run's figures and the lengths and times of its requests, from which the figures follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from millrace.bench.flags.structs import ServeFlags
from millrace.bench.load.interrupts import InterruptedRunError
from millrace.bench.runs.options_from_flags import serve_options
from millrace.bench.runs.serve import run
from millrace.errors import UserError
from millrace.report.steps.profiles import Profile
from millrace.report.steps.step import AbsentError, Place, Serving, Step
from millrace.report.steps.texts import KINDS, messages, mixed, write_prompts

_LARGE_DETAIL = "itls"  # of every chunk: much, and of no use for checks
_PERCENTILES = "50,99"
_TEMPERATURES = (0.0, 1.0)
PREFIXES = 4  # the first so many prompts of the prefix step are the first of their prefix
_SUFFIX, _PREFIX_OUTPUT, _ROUNDS = 32, 8, 4


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A load: the flags of `bench serve` without an address, and about how many tokens it is.
    texts: what is written to the file of its prompts, where it has one."""

    flags: Mapping[str, Any]
    tokens: int
    texts: tuple[list[dict[str, Any]], ...] = ()
    file: str = ""
    output: int = 0


def words_of(load: Load) -> list[str]:
    """The command of a load; its file is named below the report's directory."""
    words = ["millrace", "bench", "serve", "--base-url", "URL"]
    for name, value in load.flags.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return [*words, "--dataset-path", load.file] if load.file else words


async def send(load: Load, place: Place) -> dict[str, Any]:
    """The result fields of one run of a load. Raises UserError where no request succeeded."""
    values = dict(load.flags)
    if load.file:
        path = place.directory / load.file
        values["dataset_path"] = str(write_prompts(path, list(load.texts), load.output))
    flags = ServeFlags(**values, base_url=place.url, metric_percentiles=_PERCENTILES)
    measured = await run(serve_options(flags), stop=place.stop)
    if measured.interrupted:
        raise InterruptedRunError
    fields = {name: value for name, value in measured.fields.items() if name != _LARGE_DETAIL}
    if not fields["completed"]:
        first = next((r.error for r in measured.records if r.error), "nothing was sent")
        raise UserError(f"no request succeeded: {first}")
    return fields


def load_step(section: str, name: str, load: Load, serving: Serving, profile: Profile) -> Step:
    """A step that sends one load."""

    async def work(place: Place) -> dict[str, Any]:
        return await send(load, place)

    return Step(
        name=name,
        section=section,
        seconds=load.tokens / profile.rate + 2.0,
        work=work,
        command=tuple(words_of(load)),
        serving=serving,
    )


# --- the loads ---------------------------------------------------------------------------------


def random_load(
    lengths: tuple[int, int],
    count: int,
    streams: int,
    *,
    seed: int,
    ratio: float = 1.0,
    warmups: int = 0,
    temperature: float = 1.0,
) -> Load:
    """Random tokens, of lengths from [L x ratio, L]; answers are as long as asked for."""
    flags = {
        "dataset_name": "random",
        "num_prompts": count,
        "max_concurrency": streams,
        "random_input_len": lengths[0],
        "random_output_len": lengths[1],
        "random_range_ratio": ratio,
        "random_range_convention": "inferencex",
        "num_warmups": warmups,
        "temperature": temperature,
        "ignore_eos": True,
        "seed": seed,
    }
    return Load(flags=flags, tokens=round((count + warmups) * sum(lengths) * (1 + ratio) / 2))


def text_load(
    texts: Sequence[list[dict[str, Any]]],
    file: str,
    output: int,
    streams: int,
    *,
    temperature: float = 0.0,
    whole: bool = False,
) -> Load:
    """Texts of a chat. whole: whether answers go on to `output` tokens, whatever they say."""
    flags: dict[str, Any] = {
        "backend": "openai-chat",
        "dataset_name": "custom",
        "max_concurrency": streams,
        "num_warmups": streams,
        "temperature": temperature,
    }
    if whole:
        flags["ignore_eos"] = True
    tokens = len(texts) * (150 + output)
    return Load(flags=flags, tokens=tokens, texts=tuple(texts), file=file, output=output)


def batch_load(profile: Profile, streams: int, seed: int) -> Load:
    """So many streams of texts of all kinds, with answers of one length. No two loads of different
    seeds or streams share a text, so none finds what another left in a prefix cache."""
    texts = mixed(max(4, profile.per_batch * streams), 1000 * seed + streams)
    output = min(profile.text_output, 256)
    return text_load(texts, f"texts/mixed-{streams}-{seed}.jsonl", output, streams, whole=True)


def headline_load(profile: Profile, seed: int) -> Load:
    """Random tokens: prompts and answers of half to all of the profile's lengths."""
    warm = profile.streams // 4
    return random_load(
        profile.lengths, profile.headline, profile.streams, seed=seed, ratio=0.5, warmups=warm
    )


# --- the steps ---------------------------------------------------------------------------------


def throughput_steps(profile: Profile, serving: Serving) -> list[Step]:
    """Headline and write-up: many streams of random tokens."""
    steps = []
    for repeat in range(profile.repeats):
        load = headline_load(profile, seed=repeat)
        name = f"throughput/headline/{repeat + 1}"
        steps.append(load_step("throughput", name, load, serving, profile))
    load = random_load(
        profile.lengths, profile.write_up, profile.streams, seed=100, ratio=0.5,
        warmups=profile.streams,
    )  # fmt: skip
    steps.append(load_step("throughput", "throughput/write-up/1", load, serving, profile))
    return steps


def batch_steps(profile: Profile, serving: Serving) -> list[Step]:
    """Texts of all kinds at 1, 8 and 32 streams."""
    return [
        load_step(
            "batches", f"batches/{streams}/{repeat + 1}",
            batch_load(profile, streams, seed=repeat), serving, profile,
        )
        for repeat in range(profile.repeats)
        for streams in profile.batches
    ]  # fmt: skip


def long_steps(profile: Profile, serving: Serving) -> list[Step]:
    """Long prompts of random tokens."""
    steps = []
    for streams in profile.long_streams:
        load = random_load(profile.long_lengths, 2 * streams, streams, seed=streams, warmups=1)
        steps.append(load_step("long", f"long/{streams}", load, serving, profile))
    return steps


def acceptance_steps(profile: Profile, serving: Serving, drafts: bool) -> list[Step]:
    """Drafts of each kind of text, accepted by position, greedy and at temperature 1."""
    steps = []
    for kind in KINDS:
        texts = [messages(kind, index) for index in range(profile.texts)]
        for temperature in _TEMPERATURES:
            streams = min(8, profile.texts)
            file = f"texts/{kind}.jsonl"
            load = text_load(texts, file, profile.text_output, streams, temperature=temperature)
            name = f"acceptance/{kind}/temperature-{temperature:g}"
            step = load_step("acceptance", name, load, serving, profile)
            steps.append(step if drafts else _without_drafts(step))
    return steps


def _without_drafts(step: Step) -> Step:
    async def work(place: Place) -> Any:
        raise AbsentError("the model has no head that drafts")

    return msgspec.structs.replace(step, work=work, serving=None, seconds=0.0)


def prefix_step(profile: Profile, serving: Serving) -> Step:
    """Prompts that begin alike: the first of each prefix is computed, the others find it."""
    flags = {
        "dataset_name": "prefix_repetition",
        "num_prompts": PREFIXES * _ROUNDS,
        "max_concurrency": 1,
        "prefix_repetition_prefix_len": profile.prefix,
        "prefix_repetition_suffix_len": _SUFFIX,
        "prefix_repetition_num_prefixes": PREFIXES,
        "prefix_repetition_output_len": _PREFIX_OUTPUT,
        "ignore_eos": True,
        "seed": 7,
    }
    load = Load(flags=flags, tokens=PREFIXES * _ROUNDS * (profile.prefix + _SUFFIX))
    return load_step("prefix", "prefix/repeated", load, serving, profile)
