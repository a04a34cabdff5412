"""What a fleet is asked to do, and the settings of a replica that decide how it does it."""

from __future__ import annotations

import msgspec

from millrace.errors import ConfigError
from millrace.plan.facts.texts import text as find_text
from millrace.plan.facts.texts import tokens_per_step


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Requests at one replica. input, output: mean tokens. cached: tokens of a prompt that are in
    the prefix cache. concurrency: streams in a closed loop. rate: requests a second in an open
    one; exactly one of the two is above 0. requests: of the whole run; 0: it never ends."""

    input: float
    output: float
    concurrency: float = 0.0
    rate: float = 0.0
    requests: float = 0.0
    cached: float = 0.0
    text: str = "mixed"

    def check(self) -> None:
        """Raise ConfigError, with what works, if it is no load."""
        if self.input < 1 or self.output < 1:
            raise ConfigError(
                f"input {self.input:g} and output {self.output:g}: both need 1 token or more"
            )
        if not 0 <= self.cached < self.input:
            raise ConfigError(f"cached {self.cached:g}: use 0 to {self.input - 1:g}")
        if (self.concurrency > 0) == (self.rate > 0):
            raise ConfigError("give a concurrency or a rate, one of both, above 0")
        find_text(self.text)

    @property
    def computed(self) -> float:
        """Prompt tokens that are computed."""
        return self.input - self.cached

    @property
    def context(self) -> float:
        """Tokens of a decoding sequence in the mean."""
        return self.input + self.output / 2


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Of one replica. mixed: prompt tokens in a step that also has decode rows; 0: as many as in
    any step. apart: prompts and decode rows never share a step. served: over HTTP, not in a
    process. ranks: engines behind one address, over which streams are spread unevenly."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    mixed: int = 0
    apart: bool = False
    served: bool = True
    ranks: int = 1


def settings_of(engine: str, **others: object) -> Settings:
    """The defaults of an engine, but for `others`."""
    defaults: dict[str, dict[str, object]] = {
        "millrace": {"mixed": 1536},
        "vllm": {"max_num_batched_tokens": 16384},
        "sglang": {"apart": True, "max_num_seqs": 1024},
    }
    return msgspec.convert({**defaults.get(engine, {}), **others}, Settings)


def accepted(load: Load, drafts: int, shift: float = 0.0) -> float:
    """Tokens a step brings a row."""
    return tokens_per_step(load.text, drafts, shift) if drafts else 1.0
