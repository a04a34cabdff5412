"""Messages built from a request: its admission for the device, and its deltas for the server."""

from __future__ import annotations

from millrace.engine.request import Request
from millrace.protocol import Admission, Delta, Extras, FinishReason, TokenLogprobs
from millrace.speculation import mask_of


def make_delta(
    request: Request,
    tokens: list[int],
    reason: FinishReason | None,
    logprobs: list[TokenLogprobs] | None,
    first: bool,
) -> Delta:
    """The new tokens of a request. first: its first tokens; they carry what concerns its prompt."""
    return Delta(
        request.id,
        tokens,
        reason,
        stop_token_id=tokens[-1] if reason == "stop" else None,
        cached_tokens=request.cached_tokens,
        queued=request.queue_seconds if first else None,
        logprobs=logprobs and _own_logprobs(request, logprobs[: len(tokens)]),
        prompt_logprobs=(request.prompt_logprobs or None) if first else None,
        preemptions=request.preemptions,
        cache=request.report if first else None,
        record=max(0, request.handed_over) if first else 0,
        record_error=request.not_handed_over if first else "",
    )


def _own_logprobs(request: Request, found: list[TokenLogprobs]) -> list[TokenLogprobs]:
    """Cut to the number of tokens that the request asks for; a step reports the same number for
    all of its rows.

    Where it asks for tokens by their ids, the sampled one counts as one of them.
    """
    params = request.source.params
    if params.logprob_token_ids is not None:
        return [_of_ids(one, 1 + len(set(params.logprob_token_ids))) for one in found]
    most = 1 + (params.logprobs or 0)
    return [TokenLogprobs(one.token_ids[:most], one.logprobs[:most], one.rank) for one in found]


def _of_ids(one: TokenLogprobs, most: int) -> TokenLogprobs:
    """The sampled token, then all reported ones, the likeliest first, the sampled one among
    them."""
    pairs = zip(one.token_ids[1:most], one.logprobs[1:most], strict=True)
    values = {**dict(pairs), one.token_ids[0]: one.logprobs[0]}
    ordered = sorted(values, key=lambda token: -values[token])
    return TokenLogprobs(
        [one.token_ids[0], *ordered],
        [one.logprobs[0], *(values[token] for token in ordered)],
        one.rank,
    )


def _extras(request: Request) -> Extras | None:
    """The rarely used sampling options of a request; None if it uses none."""
    params = request.source.params
    extras = Extras(
        prompt_len=request.prompt_len,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias or {},
        allowed_token_ids=params.allowed_token_ids or [],
        bad_words=request.source.bad_words,
        min_total=request.prompt_len + params.min_tokens if params.min_tokens else 0,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        logprob_token_ids=sorted(set(params.logprob_token_ids or ())),
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
        masked=request.source.grammar is not None,
        reasoning=request.source.reasoning,
    )
    return None if extras == Extras(prompt_len=request.prompt_len) else extras


def make_admission(request: Request, snapshot: int, methods: list[str]) -> Admission:
    """methods: those of the engine that make drafts."""
    params = request.source.params
    return Admission(
        slot=request.slot,
        tokens=list(request.tokens),
        start=request.computed,
        snapshot=snapshot,
        max_total=request.max_total,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        seed=request.seed,
        stop_token_ids=sorted(request.stop_ids),
        extras=_extras(request),
        methods=mask_of(methods, params.speculative_method),
    )
