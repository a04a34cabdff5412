"""Checks of a new request against the engine's limits, and the Request that is made of it.

What can never run is refused here, with the value that would work. Whether there is room for the
request now is decided by the scheduler. This module knows no other request.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from millrace.engine.request import Request
from millrace.errors import RequestError
from millrace.lengths import check_lengths
from millrace.protocol import MAX_STOP_IDS, AddRequest, Limits
from millrace.speculation import NO_DRAFTS

_MASK64 = (1 << 64) - 1


def make_request(source: AddRequest, limits: Limits, ordinal: int) -> Request:
    """The scheduler's Request of a checked AddRequest. ordinal: its number in order of arrival."""
    params, length = source.params, len(source.prompt)
    longest = limits.max_model_len
    wanted = longest if params.max_tokens is None else length + params.max_tokens
    return Request(
        id=source.id,
        prompt_len=length,
        tokens=array("i", source.prompt + source.resume),
        max_total=min(wanted, longest),
        stop_ids=_stop_ids(source, limits),
        seed=_seed(params.seed, limits.seed, ordinal),
        ordinal=ordinal,
        source=source,
        expected=_expected(source, limits),
    )


def record_tokens(length: int, limits: Limits) -> int:
    """Tokens of the record of a prompt: all but the last, which gives the first logits; of prefixes
    that are their pages, whole pages."""
    if limits.cache_policy == "page":
        return (length - 1) // limits.page_size * limits.page_size
    return length - 1


def _expected(source: AddRequest, limits: Limits) -> int:
    if source.source is None:
        return 0
    length = len(source.prompt) + len(source.resume)
    return source.source.tokens or record_tokens(length, limits)


def check(source: AddRequest, limits: Limits) -> None:
    """Raise RequestError unless the request can run."""
    check_lengths(len(source.prompt), len(source.resume), limits.max_model_len)
    if (count := len(_stop_ids(source, limits))) > MAX_STOP_IDS:
        raise RequestError(
            f"{count} stop tokens; at most {MAX_STOP_IDS} are possible", param="stop_token_ids"
        )
    if source.priority and not limits.priorities:
        raise RequestError(
            "priority needs a server started with --scheduling-policy priority", param="priority"
        )
    _check_transfer(source, limits)
    params = source.params
    _check_method(params.speculative_method, limits)
    named = {
        "prompt": source.prompt,
        "resume_token_ids": source.resume,
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
        "logprob_token_ids": params.logprob_token_ids or (),
    }
    for name, wanted in (
        ("logprobs", params.logprobs),
        ("prompt_logprobs", params.prompt_logprobs),
    ):
        if wanted is not None and not 0 <= wanted <= limits.vocab_size:
            raise RequestError(f"{name} must be from 0 to {limits.vocab_size}", param=name)
    for name, ids in named.items():
        _check_ids(name, ids, limits.vocab_size)


def _check_transfer(source: AddRequest, limits: Limits) -> None:
    if not (source.hand_over or source.source):
        return
    if not limits.transfers:
        raise RequestError(
            "kv_transfer_params need a server started with --role prefill, decode or both",
            param="kv_transfer_params",
        )
    if source.params.prompt_logprobs is not None:
        raise RequestError(
            "kv_transfer_params and prompt_logprobs: these need the whole prompt computed in one "
            "place; leave one of them out",
            param="prompt_logprobs",
        )
    tokens = len(source.prompt) + len(source.resume)
    if source.source is not None and not 0 <= source.source.tokens < tokens:
        raise RequestError(
            f"kv_transfer_params: the record has {source.source.tokens} tokens, and the prompt has "
            f"{tokens}; send the prompt that the record was made of",
            param="kv_transfer_params",
        )


def _check_method(wanted: str | None, limits: Limits) -> None:
    if wanted is None or wanted == NO_DRAFTS or wanted in limits.methods:
        return
    here = f"drafts by {' and '.join(limits.methods)}" if limits.methods else "makes no drafts"
    known = [*limits.methods, NO_DRAFTS]
    raise RequestError(
        f"speculative_method {wanted!r}: this engine {here}; use {' or '.join(known)}, or leave it "
        "out",
        param="speculative_method",
    )


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    if (largest := max(ids, default=0)) >= vocab_size:
        raise RequestError(
            f"{name} contains token {largest}; the model's tokens are 0 to {vocab_size - 1}",
            param=name,
        )


def _stop_ids(source: AddRequest, limits: Limits) -> frozenset[int]:
    """Tokens that end the request."""
    stop_ids = frozenset(source.params.stop_token_ids)
    # A finished grammar allows the end alone, so there the end always counts.
    if not source.params.ignore_eos or source.grammar is not None:
        stop_ids |= limits.eos_ids
    return stop_ids


def _seed(wanted: int | None, engine_seed: int, ordinal: int) -> int:
    """A request's sampling seed (signed, 64 bits): its own, or one mixed from its ordinal.

    The mix is splitmix64's finaliser (Steele, Lea, Flood 2014), so that the seeds of
    neighbours have nothing in common.
    """
    if wanted is not None:
        value = wanted & _MASK64
    else:
        value = (engine_seed + (ordinal + 1) * 0x9E3779B97F4A7C15) & _MASK64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
        value ^= value >> 31
    return value - (1 << 64) if value >> 63 else value
