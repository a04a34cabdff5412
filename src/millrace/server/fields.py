"""From a body's fields to `SamplingParams`, and what becomes of fields that are not served.

A field that is known to the OpenAI or vLLM API, is not served, and would change the answer is
refused unless it holds the value that changes nothing. One that changes nothing is accepted. An
unknown field is ignored with a warning, as vLLM does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from millrace.errors import RequestError
from millrace.protocol import SamplingParams
from millrace.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from millrace.text.files import SamplingDefaults

logger = logging.getLogger(__name__)

MAX_STOPS = 64

# Not served: the values at which each field changes nothing (null never does).
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "priority": (0,),
    "prompt_embeds": (),
    "return_tokens_as_token_ids": (False,),
}

# Known, and without influence on the answer.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "request_id",
    }
)

_PATH = re.compile(r" - at `\$\.?([^`]*)`")
_Body = TypeVar("_Body", bound=GenerationRequest)
_warned: set[str] = set()


def parse_body(data: bytes, kind: type[_Body]) -> _Body:
    """A body as `kind`. Raises RequestError that names the field and what it must be."""
    try:
        body = msgspec.json.decode(data, type=kind)
        given = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    _check_others(given, set(kind.__struct_fields__))
    return body


def _invalid_field(message: str) -> RequestError:
    """From `Expected int, got str - at $.top_k` to a message that begins with the field."""
    found = _PATH.search(message)
    text = _PATH.sub("", message).replace("`", "")
    path = found.group(1) if found else ""
    if path:
        return RequestError(f"{path}: {text}", param=re.split(r"[.\[]", path)[0])
    missing = re.search(r"missing required field (\w+)", text)
    if missing:
        return RequestError(f"{missing.group(1)} is missing", param=missing.group(1))
    return RequestError(f"the body must be a JSON object: {text}")


def _check_others(given: Mapping[str, msgspec.Raw], served: set[str]) -> None:
    for name in given.keys() - served:
        if name in REFUSED:
            value = msgspec.json.decode(given[name])
            if value is not None and not any(_same(value, neutral) for neutral in REFUSED[name]):
                raise RequestError(
                    f"{name} is not supported by this server; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
        elif name not in HARMLESS:
            _warn_once(name)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and both or neither a truth value: 0 is no `false` and 1 no `true`."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _warn_once(name: str) -> None:
    if name not in _warned and len(_warned) < 1000:
        _warned.add(name)
        logger.warning("unknown field %.80r is ignored", name)


def sampling_params(body: GenerationRequest, defaults: SamplingDefaults) -> SamplingParams:
    """How to sample for this body. Raises RequestError."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > MAX_STOPS:
        raise RequestError(f"stop has {len(stop)} texts; at most {MAX_STOPS} work", param="stop")
    return SamplingParams(
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=_or(body.top_k, defaults.top_k),
        seed=body.seed,
        max_tokens=_max_tokens(body),
        stop=stop,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=body.ignore_eos,
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
    )


def _max_tokens(body: GenerationRequest) -> int | None:
    """What the body asks for; None where it says nothing, or asks for as many as fit."""
    if isinstance(body, ChatRequest):
        newer = body.max_completion_tokens
        return body.max_tokens if newer is None else newer
    assert isinstance(body, CompletionRequest)
    return None if isinstance(body.max_tokens, msgspec.UnsetType) else body.max_tokens


_Number = TypeVar("_Number", int, float)


def _or(value: _Number | None, default: _Number) -> _Number:
    return default if value is None else value
