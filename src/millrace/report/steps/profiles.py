"""How large everything is: named sets of sizes, and which of them suits a machine.

The workloads have the same shapes in all profiles. A smaller profile has fewer and shorter
requests, so its figures are no figures of the larger one; a report says which it used.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from millrace.fleet.device_assignment import visible_gpus
from millrace.hardware.nvml import Nvml

_LARGE = 40e9  # bytes of a GPU's memory, from which on the whole sizes are sensible


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes. Lengths are tokens (words where text is sent), times are seconds.

    items: of each accuracy task. texts: prompts of each kind of text; text_output: the most tokens
    of an answer to one. logprob_tokens: of an answer. headline, write_up: requests; streams: in
    flight there. lengths: of their prompts and answers, the longest; the shortest are half of them.
    batches: streams; per_batch: requests for each stream. long_lengths, long_streams: of long
    prompts. prefix: tokens of a shared prefix. repeats: runs of each load. starts: warm ones.
    selftest: streams. drafts: of the acceptance by depth. rate: tokens a second that the estimate
    of times assumes, for all streams together. start: seconds of a start, for the same.
    headline_arguments: more arguments of the server of headline and write-up.
    """

    name: str
    says: str
    items: int
    instructions: int
    texts: int
    text_output: int
    logprob_texts: int
    logprob_tokens: int
    headline: int
    write_up: int
    streams: int
    lengths: tuple[int, int]
    batches: tuple[int, ...]
    per_batch: int
    long_lengths: tuple[int, int]
    long_streams: tuple[int, ...]
    prefix: int
    repeats: int
    starts: int
    selftest: tuple[int, ...]
    selftest_seconds: float
    rounds: int
    drafts: int = 5
    long_drafts: int = 3
    max_model_len: int = 4096
    rate: float = 1000.0
    start: float = 10.0
    headline_arguments: tuple[str, ...] = ()


PROFILES = {
    one.name: one
    for one in (
        Profile(
            name="full",
            says="the sizes of the published figures, for a large GPU",
            items=500, instructions=300, texts=48, text_output=512, logprob_texts=16,
            logprob_tokens=64, headline=768, write_up=1280, streams=256, lengths=(1024, 512),
            batches=(1, 8, 32), per_batch=6, long_lengths=(8192, 1024), long_streams=(1, 16),
            prefix=8192, repeats=3, starts=3, selftest=(16, 64, 256), selftest_seconds=5.0,
            rounds=3, max_model_len=10240, rate=5000.0, start=60.0,
            headline_arguments=("--kv-cache-dtype", "fp8_e4m3"),
        ),
        Profile(
            name="small",
            says="for a CPU or a small GPU: a tenth of the requests, an eighth of the lengths",
            items=60, instructions=40, texts=8, text_output=96, logprob_texts=6, logprob_tokens=32,
            headline=64, write_up=96, streams=32, lengths=(128, 64), batches=(1, 8, 32),
            per_batch=2, long_lengths=(1024, 128), long_streams=(1, 4), prefix=1024, repeats=3,
            starts=2, selftest=(16, 64), selftest_seconds=4.0, rounds=3, max_model_len=2048,
            rate=500.0, start=8.0,
        ),
        Profile(
            name="smoke",
            says="seconds, to see whether all of it runs; its figures say nothing",
            items=3, instructions=3, texts=2, text_output=8, logprob_texts=2, logprob_tokens=4,
            headline=4, write_up=4, streams=2, lengths=(16, 8), batches=(1, 2), per_batch=2,
            long_lengths=(64, 8), long_streams=(1,), prefix=32, repeats=2, starts=1,
            selftest=(2,), selftest_seconds=1.0, rounds=2, max_model_len=4096, rate=500.0,
            start=4.0,
        ),
    )
}  # fmt: skip


def default_profile() -> tuple[Profile, str]:
    """The profile that suits this machine, and why."""
    if not visible_gpus():
        return PROFILES["small"], "there is no GPU"
    memory = largest_memory()
    if memory is None:
        return PROFILES["full"], "there is a GPU, whose memory is not known here"
    name = "full" if memory >= _LARGE else "small"
    return PROFILES[name], f"the largest GPU has {memory / 1e9:.0f} GB"


def largest_memory(nvml: Nvml | None = None) -> float | None:
    """Bytes of the largest GPU's memory; None where the driver does not say."""
    nvml = Nvml() if nvml is None else nvml
    sizes: Sequence[float] = [
        sample["memory_total_bytes"]
        for device in nvml.devices
        if "memory_total_bytes" in (sample := nvml.sample(device))
    ]
    return max(sizes, default=None)


def fitted(profile: Profile, longest: int | None) -> Profile:
    """The profile for a model that takes at most `longest` tokens; None: it does not say."""
    if longest is None or longest >= profile.max_model_len:
        return profile
    room = longest // 8
    long_in, long_out = profile.long_lengths
    return msgspec.structs.replace(
        profile,
        max_model_len=longest,
        long_lengths=(min(long_in, 6 * room), min(long_out, room)),
        lengths=(min(profile.lengths[0], 3 * room), min(profile.lengths[1], room)),
        prefix=min(profile.prefix, 4 * room),
        text_output=min(profile.text_output, 2 * room),
    )
