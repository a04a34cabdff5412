"""How drafts are made: the option `speculative_config`, with vLLM's keys, and what it resolves to.

It knows options and the few facts of a model that they depend on. It knows no model and no step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from millrace.errors import ConfigError

MAX_DRAFTS = 5  # of one method at once
AUTO_DRAFTS = 3  # of a head, where the engine chooses
_WITH_MODEL = ("eagle3", "draft_model")  # methods whose weights are another checkpoint's
MOST_DEPTHS = 3  # each has CUDA graphs of its own
NO_DRAFTS = "none"  # what a request names that wants none
HeadMethod = Literal["mtp", "eagle3", "draft_model"]
LookupMethod = Literal["ngram", "suffix"]
Method = Literal["mtp", "ngram", "suffix", "eagle3", "draft_model"]
METHODS = ("mtp", "ngram", "suffix", "eagle3", "draft_model")
# A match of so many tokens is worth more than one draft of a head. vLLM's n-grams have 5 tokens.
LEAST_MATCH = 3
NGRAM = 5


class SpeculativeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Speculative decoding. Names follow vLLM, except the last three.

    method: "mtp": the model's own head; "eagle3", "draft_model": the head or model in the directory
    `model`; "ngram", "suffix": what followed the last tokens where they
    stood before, in the request's own prompt and output. num_speculative_tokens: drafts of a step
    and row; not given: 1 of MTP, 3 of other heads, 5 of a look-up; "auto": the engine chooses step
    by step. num_speculative_tokens_per_batch_size: (least rows, most rows, drafts); steps of other
    rows have num_speculative_tokens. prompt_lookup_min, prompt_lookup_max:
    tokens that must be the same, and that are compared at most. suffix_decoding_max_tree_depth: the
    same for "suffix". suffix_decoding_max_spec_factor: drafts for each token that is the same.
    suffix_decoding_max_cached_requests, suffix_decoding_min_token_prob: taken without effect: the
    tokens of other requests are not looked at, and of several places the last one is taken.

    lookup: with a head: rows look up their drafts first, by this method, and take those of the head
    where nothing is found. quantization: "fp8": the head's drafts use an FP8 copy of the output
    head; null or "none": the head itself; not given: "fp8" if the checkpoint is FP8 and stays FP8
    on the device. synthetic_acceptance: with random weights no draft is ever right; a rate here
    accepts each draft with that probability (one rate for all positions, or one for each).
    """

    method: Method = "mtp"
    model: str | None = None
    num_speculative_tokens: int | Literal["auto"] | None = None
    num_speculative_tokens_per_batch_size: list[tuple[int, int, int]] | None = None
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_requests: int = 0
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1
    lookup: LookupMethod | None = None
    quantization: str | msgspec.UnsetType | None = msgspec.UNSET
    synthetic_acceptance: float | list[float] | None = None


class Lookup(msgspec.Struct, frozen=True):
    """Drafts from the request's own tokens.

    drafts: of a row at most. shortest, longest: tokens that must be the same, and that are
    compared. factor: drafts for each token that is the same; 0: always `drafts`.
    """

    method: LookupMethod
    drafts: int
    shortest: int
    longest: int
    factor: float = 0.0


class Speculation(msgspec.Struct, frozen=True):
    """How drafts of an engine are made.

    drafts: k, of a row at most. head: the method that drafts by weights; "": none. model: where
    these are, if not in the model's checkpoint. head_drafts: of it at most. lookup: None: there is
    none. acceptance: synthetic rates by position. depths: numbers of drafts that a step's rows may
    verify, ascending; empty: always `drafts`. schedule: (least rows, most rows, depth), in place of
    a choice by measurement.
    """

    drafts: int = 0
    head: HeadMethod | Literal[""] = ""
    head_drafts: int = 0
    model: str = ""
    lookup: Lookup | None = None
    acceptance: tuple[float, ...] | None = None
    depths: tuple[int, ...] = ()
    schedule: tuple[tuple[int, int, int], ...] = ()

    @property
    def all_depths(self) -> tuple[int, ...]:
        """Those that steps have graphs for, the largest last."""
        return self.depths or (self.drafts,)

    @property
    def methods(self) -> list[str]:
        """The methods of this engine, the one that is asked first last."""
        found: list[str] = [self.head] if self.head else []
        return [*found, self.lookup.method] if self.lookup else found

    def mask(self, wanted: str | None) -> int:
        """The methods that draft for a request, a bit each in the order of `methods`. wanted: the
        only one, or NO_DRAFTS; None: all."""
        return mask_of(self.methods, wanted)


def mask_of(methods: list[str], wanted: str | None) -> int:
    """As `Speculation.mask`, by the names."""
    return sum(1 << at for at, name in enumerate(methods) if wanted in (None, name))


def resolve_speculation(spec: SpeculativeConfig | None, mtp_layers: int) -> Speculation:
    """mtp_layers: of the checkpoint. Raises ConfigError with the key, its value and one that
    works."""
    if spec is None or spec.num_speculative_tokens == 0:
        return Speculation()
    wanted = spec.num_speculative_tokens
    k = None if wanted == "auto" else wanted
    if k is not None and not 0 <= k <= MAX_DRAFTS:
        raise ConfigError(f'num_speculative_tokens {k}: use 0 to {MAX_DRAFTS}, or "auto"')
    if spec.model is not None and spec.method not in _WITH_MODEL:
        raise ConfigError(
            f'speculative_config.model "{spec.model}": method {spec.method} has none; leave it '
            "out, or use eagle3 or draft_model"
        )
    if spec.method in ("ngram", "suffix"):
        if spec.lookup is not None:
            raise ConfigError(
                f'speculative_config.lookup "{spec.lookup}": it goes with a head; '
                f'method "{spec.method}" is a look-up itself'
            )
        method: LookupMethod = "ngram" if spec.method == "ngram" else "suffix"
        found = Speculation(lookup=_lookup(spec, method, k or MAX_DRAFTS))
    elif spec.method in _WITH_MODEL and spec.model is None:
        raise ConfigError(
            f'speculative_config: method {spec.method} needs "model", the directory of the drafter'
        )
    elif spec.method == "mtp" and mtp_layers == 0:
        raise ConfigError(
            "speculative_config: this checkpoint has no MTP head; leave it out, or use the "
            'method "ngram", "suffix", "eagle3" or "draft_model"'
        )
    else:
        k = k or (AUTO_DRAFTS if wanted == "auto" or spec.method != "mtp" else 1)
        lookup = None if spec.lookup is None else _lookup(spec, spec.lookup, MAX_DRAFTS)
        head: HeadMethod = spec.method  # type: ignore[assignment]
        found = Speculation(head=head, head_drafts=k, model=spec.model or "", lookup=lookup)
    drafts = max(found.head_drafts, found.lookup.drafts if found.lookup else 0)
    return msgspec.structs.replace(
        found,
        drafts=drafts,
        acceptance=_rates(spec, drafts),
        depths=_depths(spec, found, drafts),
        schedule=tuple(spec.num_speculative_tokens_per_batch_size or ()),
    )


def _depths(spec: SpeculativeConfig, found: Speculation, drafts: int) -> tuple[int, ...]:
    """The depths of steps, of which the largest is `drafts`."""
    schedule = spec.num_speculative_tokens_per_batch_size
    if schedule is None:
        if spec.num_speculative_tokens != "auto":
            return ()
        # One draft shows when texts begin to repeat; with both methods it nearly always pays.
        few = (1, 3) if found.lookup and found.head else (0, 1)
        return tuple(sorted({*few, drafts}))
    key = "num_speculative_tokens_per_batch_size"
    if spec.num_speculative_tokens == "auto":
        raise ConfigError(f'speculative_config.{key}: it says what "auto" would choose; give one')
    for low, high, depth in schedule:
        if not (1 <= low <= high and 0 <= depth <= drafts):
            raise ConfigError(
                f"speculative_config.{key} [{low}, {high}, {depth}]: use [least rows, most rows, "
                f"drafts], rows from 1 on and 0 to {drafts} drafts"
            )
    depths = tuple(sorted({drafts, *(depth for _, _, depth in schedule)}))
    if len(depths) > MOST_DEPTHS:
        raise ConfigError(
            f"speculative_config.{key}: {len(depths)} numbers of drafts with "
            f"num_speculative_tokens; each has CUDA graphs of its own, so use at most {MOST_DEPTHS}"
        )
    return depths


def _lookup(spec: SpeculativeConfig, method: LookupMethod, drafts: int) -> Lookup:
    """The look-up that the keys ask for. Beside a head a match must be longer by default."""
    least, most = spec.prompt_lookup_min, spec.prompt_lookup_max
    if method == "suffix":
        factor, depth = spec.suffix_decoding_max_spec_factor, spec.suffix_decoding_max_tree_depth
        _check("suffix_decoding_max_spec_factor", factor, factor > 0, "more than 0")
        _check("suffix_decoding_max_tree_depth", depth, 1 <= depth <= 1024, "1 to 1024")
        cached = spec.suffix_decoding_max_cached_requests
        _check("suffix_decoding_max_cached_requests", cached, cached >= 0, "0 or more")
        least_prob = spec.suffix_decoding_min_token_prob
        _check("suffix_decoding_min_token_prob", least_prob, 0 <= least_prob <= 1, "0 to 1")
        shortest = least or (1 if spec.method == "suffix" else LEAST_MATCH)
        return Lookup(method, drafts, shortest, max(depth, shortest), factor)
    shortest = least or most or (NGRAM if spec.method == "ngram" else LEAST_MATCH)
    longest = most or max(shortest, NGRAM)
    _check("prompt_lookup_min", shortest, 1 <= shortest <= longest, f"1 to {longest}")
    _check("prompt_lookup_max", longest, longest <= 1024, f"{shortest} to 1024")
    return Lookup(method, drafts, shortest, longest)


def _check(key: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"speculative_config.{key} {value:g}: use {expected}")


def _rates(spec: SpeculativeConfig, k: int) -> tuple[float, ...] | None:
    rates = spec.synthetic_acceptance
    if rates is None:
        return None
    listed = [rates] * k if isinstance(rates, float) else list(rates)
    if len(listed) != k or not all(0.0 <= rate <= 1.0 for rate in listed):
        raise ConfigError(f"synthetic_acceptance {rates}: use one rate in [0, 1], or {k} of them")
    return tuple(listed)


def named_speculation(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys with Millrace's names of methods. Raises ConfigError for methods that it lacks."""
    method = spec.get("method")
    if method is None and isinstance(model := spec.get("model"), str):
        return {**spec, "method": "eagle3" if "eagle3" in model.lower() else "draft_model"}
    method = method or "mtp"
    if isinstance(method, str) and method.endswith("_mtp"):
        return {**spec, "method": "mtp"}
    if method not in METHODS:
        known = f"{', '.join(METHODS[:-1])} or {METHODS[-1]}"
        raise ConfigError(f"speculative_config.method {method!r}: use {known}")
    return spec
