"""From a body's JSON to its fields, and from these to `SamplingParams`.

`field_table` says what becomes of fields that a body has not: one that would change the answer is
refused unless it holds a value that changes nothing, and one without effect is logged. An unknown
field is ignored with a warning, as vLLM does.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_type_hints

import msgspec

from millrace.errors import RequestError
from millrace.protocol import SamplingParams, StructuredOutputs
from millrace.server.api.field_table import (
    Fate,
    FieldRules,
    Refusal,
    counting_rules,
    field_rules,
)
from millrace.server.api.request_schema import (
    ChatOptions,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
)
from millrace.server.api.response_formats import strictness, wanted_output
from millrace.text.checkpoint.files import SamplingDefaults
from millrace.text.tools.schema_dialects import Strictness

logger = logging.getLogger(__name__)

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters of one; each character of the output is compared with it
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 128  # characters of one; each is encoded
# Of a body's JSON: what can make many Python objects of few bytes. Text of this amount fits into
# no model's context.
MAX_CONTAINERS = 1 << 18  # objects and arrays
MAX_COMMAS = 1 << 20
_LARGE_BODY = 1 << 18  # bytes; smaller bodies hold no such number
_LONGEST_NEUTRAL = 100  # bytes of JSON of the values at which refused fields change nothing
MAX_PRIORITY = 2**31


CHATS, COMPLETIONS = field_rules("chat"), field_rules("completions")
COUNTING = counting_rules("chat")  # of endpoints without an answer of the model

_PATH = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`")
_Body = TypeVar("_Body", bound=ModelRequest)
_split_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_warned: set[str] = set()
_MOST_WARNINGS = 1000


def parse_body(
    data: bytes | bytearray, kind: type[_Body], rules: FieldRules = COUNTING
) -> tuple[_Body, Mapping[str, msgspec.Raw]]:
    """A body as `kind`, and the JSON of each field as the client wrote it.

    The body is split into its fields once and each field is decoded once. Raises RequestError that
    names the field and what it must be.
    """
    _check_amount(data)
    try:
        given = _split_fields(data)
    except msgspec.ValidationError as error:
        raise RequestError(f"the body must be a JSON object: {_plain(str(error))}") from None
    except (ValueError, RecursionError) as error:  # DecodeError and UnicodeError are ValueErrors
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    required, decoders = _fields_of(kind)
    values = {}
    for name, raw in given.items():
        decode = decoders.get(name)
        if decode is None:
            _check_other_field(name, raw, rules)
        else:
            values[name] = _decode_field(name, raw, decode)
            if name in rules.nested:
                _check_nested(name, raw, rules.nested[name])
    for name in required:
        if name not in values:
            raise RequestError(f"{name} is missing", param=name)
    return kind(**values), given


def _check_amount(data: bytes | bytearray) -> None:
    """Raise RequestError for a body of so many parts that decoding it would stop the server."""
    if len(data) < _LARGE_BODY:
        return
    if data.count(b"{") + data.count(b"[") > MAX_CONTAINERS or data.count(b",") > MAX_COMMAS:
        raise RequestError(
            f"the body has too many parts; at most {MAX_CONTAINERS} objects and arrays and "
            f"{MAX_COMMAS} commas work",
            code="body_too_large",
        )


@cache
def _fields_of(kind: type[ModelRequest]) -> tuple[list[str], Mapping[str, Callable[[Any], Any]]]:
    """(the required fields, what decodes each field)."""
    types = get_type_hints(kind)
    fields = msgspec.structs.fields(kind)
    decoders = {one.name: msgspec.json.Decoder(types[one.name]).decode for one in fields}
    return [one.name for one in fields if one.required], decoders


def _decode_field(name: str, raw: msgspec.Raw, decode: Callable[[Any], Any]) -> Any:
    try:
        return decode(raw)
    except msgspec.ValidationError as error:
        if name == "logit_bias":
            _check_token_keys(name, raw)
        raise _invalid_field(name, str(error)) from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise RequestError(
            f"{name} is not valid JSON: {error}", param=name, code="invalid_json"
        ) from None


def _check_token_keys(name: str, raw: msgspec.Raw) -> None:
    """Raise RequestError that names keys of an object that are no token ids."""
    given = msgspec.json.decode(raw)
    keys = [key for key in given if not key.isdecimal()] if isinstance(given, dict) else []
    if keys:
        named = ", ".join(f"{key!r:.40}" for key in keys[:5])
        raise RequestError(f"{name}: keys are token ids, got {named}", param=name)


def _invalid_field(name: str, message: str) -> RequestError:
    """From `Expected int, got str - at $[0]` to a message that begins with the place."""
    found = _PATH.search(message)
    path = found.group(1) if found else ""
    place = f"{name}{path}" if not path or path.startswith("[") else f"{name}.{path}"
    return RequestError(f"{place}: {_plain(_PATH.sub('', message))}", param=name)


def _plain(message: str) -> str:
    return message.replace("`", "")


def _check_nested(name: str, raw: msgspec.Raw, fates: Mapping[str, Fate]) -> None:
    """Check the fields within a field, if it is an object."""
    if bytes(memoryview(raw)[:1]) != b"{":
        return
    for inner, value in _split_fields(raw).items():
        if fates.get(inner) != "served":
            _check_fate(f"{name}.{inner}", value, fates.get(inner), param=name)


def _check_other_field(name: str, raw: msgspec.Raw, rules: FieldRules) -> None:
    """A field that the endpoint does not have: refused, without effect, or unknown."""
    _check_fate(name, raw, rules.fates.get(name), param=name)


def _check_fate(name: str, raw: msgspec.Raw, fate: Fate | None, param: str) -> None:
    if isinstance(fate, Refusal):
        if not _is_neutral(raw, fate.neutral):
            raise RequestError(
                f"{name} is not supported: {fate.reason}; leave it out",
                param=param,
                code="unsupported_parameter",
            )
    elif fate is None:
        warn_once(f"unknown field {name[:80]!r} is ignored")
    else:
        warn_once(f"field {name!r} has no effect here", logging.INFO)


_TOOL_KEYS = {"type", "name", "description", "strict", "function", "parameters", "input_schema"}
_IDLE_TOOL_KEYS = {"cache_control", "eager_input_streaming", "allowed_callers", "defer_loading"}


def note_tool_keys(tool: Mapping[str, Any]) -> None:
    """Log what an API's description of a function has that no model is told of."""
    for name in sorted(tool.keys() - _TOOL_KEYS):
        if name in _IDLE_TOOL_KEYS:
            warn_once(f"field 'tools.{name}' has no effect here", logging.INFO)
        else:
            warn_once(f"unknown field {f'tools.{name}'[:80]!r} is ignored")


def _is_neutral(raw: msgspec.Raw, neutrals: tuple[Any, ...]) -> bool:
    """Whether a refused field holds null or a value at which it changes nothing."""
    text = bytes(memoryview(raw)[: _LONGEST_NEUTRAL + 1])
    if len(text) > _LONGEST_NEUTRAL:
        return False
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return value is None or any(_same(value, neutral) for neutral in neutrals)


def _same(value: Any, neutral: Any) -> bool:
    """Equal and of the same kind: 0 is not `false` and 1 is not `true`."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def warn_once(message: str, level: int = logging.WARNING) -> None:
    """Log what a client's field does not do; each message once, and at most a thousand of them."""
    if message not in _warned and len(_warned) < _MOST_WARNINGS:
        _warned.add(message)
        logger.log(level, "%.300s", message)


def sampling_params(body: GenerationRequest, defaults: SamplingDefaults) -> SamplingParams:
    """How to sample for this body. Raises RequestError."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    _check_texts("stop", stop, MAX_STOPS, MAX_STOP_LENGTH)
    bad_words = body.bad_words or []
    _check_texts("bad_words", bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH)
    if abs(body.priority or 0) > MAX_PRIORITY:
        raise RequestError("priority must be a 32-bit integer", param="priority")
    return SamplingParams(
        n=_or(body.n, 1),
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=_or(body.top_k, defaults.top_k),
        min_p=_or(body.min_p, defaults.min_p),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=body.logit_bias or None,
        allowed_token_ids=body.allowed_token_ids,
        bad_words=bad_words,
        seed=body.seed,
        max_tokens=_max_tokens(body),
        min_tokens=_or(body.min_tokens, 0),
        stop=stop,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
        logprobs=_logprobs(body),
        logprob_token_ids=_logprob_token_ids(body),
        prompt_logprobs=_prompt_logprobs(body),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        speculative_method=body.speculative_method,
    )


def _check_texts(name: str, texts: list[str], most: int, longest: int) -> None:
    """Raise RequestError for too many texts, or one that is too long."""
    if len(texts) > most:
        raise RequestError(f"{name} has {len(texts)} texts; at most {most} work", param=name)
    for at, text in enumerate(texts):
        if len(text) > longest:
            raise RequestError(
                f"{name}[{at}] has {len(text)} characters; at most {longest} work", param=name
            )


def check_resume(body: GenerationRequest, outputs: int) -> None:
    """Raise RequestError if tokens are to be resumed and it is not clear for which output."""
    if body.resume_token_ids and outputs > 1:
        raise RequestError(
            "resume_token_ids belongs to one output; send one prompt and n 1",
            param="resume_token_ids",
        )


@contextlib.contextmanager
def naming_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name fields as their API has them. names: by the name of the chat's field."""
    try:
        yield
    except RequestError as error:
        found = _HEAD.match(error.param or "")
        if found and found[0] in names:
            head, message = found[0], str(error)
            if message.startswith(head):
                error.args = (names[head] + message[len(head) :],)
            error.param = names[head] + (error.param or "")[len(head) :]
        raise


_HEAD = re.compile(r"\w+")


def _max_tokens(body: GenerationRequest) -> int | None:
    """The body's max_tokens; None where it has none, or asks for as many as fit."""
    if isinstance(body, ChatOptions):
        newer = body.max_completion_tokens
        return body.max_tokens if newer is None else newer
    assert isinstance(body, CompletionRequest)
    if isinstance(body.max_tokens, msgspec.UnsetType):
        return None
    if body.max_tokens == 0 and body.echo:  # only the prompt is wanted
        return 1
    return body.max_tokens


def _logprobs(body: GenerationRequest) -> int | None:
    if isinstance(body, ChatOptions):
        if not body.logprobs and body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return _or(body.top_logprobs, 0) if body.logprobs else None
    assert isinstance(body, CompletionRequest)
    if body.logprobs is None and _or(body.best_of, 1) > 1:
        return 0  # best_of compares outputs by them
    return body.logprobs


def _logprob_token_ids(body: GenerationRequest) -> list[int] | None:
    wanted = body.logprob_token_ids or None
    if wanted and _logprobs(body) is None:
        raise RequestError("logprob_token_ids needs logprobs", param="logprob_token_ids")
    return wanted


def _prompt_logprobs(body: GenerationRequest) -> int | None:
    """An echoed prompt is reported like the output."""
    if isinstance(body, CompletionRequest) and body.echo and body.prompt_logprobs is None:
        return body.logprobs
    return body.prompt_logprobs


class WantedOutput(NamedTuple):
    """What an answer must match, the field that says so, and how strict its schema is."""

    outputs: StructuredOutputs
    field: str
    strictness: Strictness


def structured_outputs(body: GenerationRequest) -> WantedOutput | None:
    """What the answer must match. Raises RequestError."""
    found = [
        (name, wanted)
        for name, wanted in (
            ("response_format", wanted_output(body.response_format, _note_unknown)),
            ("structured_outputs", body.structured_outputs),
            *((f"guided_{kind}", _guided(body, kind)) for kind in _GUIDED),
        )
        if wanted is not None
    ]
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise RequestError(f"{names} exclude each other; give one", param=found[1][0])
    name, wanted = found[0]
    unknown = sorted(wanted.keys() - set(StructuredOutputs.__struct_fields__))
    if unknown:
        known = ", ".join(StructuredOutputs.__struct_fields__)
        message = f"{name}.{unknown[0]} is not supported; {known} are"
        raise RequestError(message, param=name, code="unsupported_parameter")
    strict = strictness(body.response_format)
    try:
        return WantedOutput(msgspec.convert(wanted, StructuredOutputs), name, strict)
    except msgspec.ValidationError as error:
        raise _invalid_field(name, str(error)) from None


def _note_unknown(name: str) -> None:
    warn_once(f"unknown field {f'response_format.{name}'[:80]!r} is ignored")


_GUIDED = ("json", "regex", "choice", "grammar")


def _guided(body: GenerationRequest, kind: str) -> dict[str, Any] | None:
    value = getattr(body, f"guided_{kind}")
    return None if value is None else {kind: value}


_Number = TypeVar("_Number", int, float)


def _or(value: _Number | None, default: _Number) -> _Number:
    return default if value is None else value
