"""Chat templates: messages to the prompt text that a model was trained on.

Templates are Jinja programs that come with a checkpoint, so they run in a sandbox. What they may
use is what Hugging Face gives them, so that both render the same text.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from millrace.errors import CheckpointError, RequestError, one_line
from millrace.text.chat.effort import VARIABLE, known_efforts
from millrace.text.chat.system_notes import one_system_message
from millrace.text.checkpoint.files import read_json
from millrace.text.messages import Message

RENDER_SECONDS = 10.0
MAX_REPEATED = 1 << 20  # parts of a text or list that `*` makes
MAX_POWER = 64
_TIMED = "_timed"
_TOO_SLOW = "template_too_slow"
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class _Generation(Extension):
    """`{% generation %}` marks text for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> Any:
        return caller()


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _TooSlowError(jinja2.TemplateError):
    """A template has used up the time of one rendering."""


class _Deadline(threading.local):
    """When the rendering of this thread must be done, on the monotonic clock."""

    at = math.inf
    loops = 0

    def check(self) -> None:
        """Count one iteration of a loop; raise _TooSlowError if the time is up."""
        self.loops += 1
        if self.loops % 256 == 0 and monotonic() > self.at:
            raise _TooSlowError("it takes too long")


_deadline = _Deadline()


class _TimedIterable:
    """What a template loops over, with a look at the clock in each iteration."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            _deadline.check()
            yield value


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, without the two operators that make large values of small ones."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            is_sequence = isinstance(value, (str, list, tuple)) and isinstance(times, int)
            if operator == "*" and is_sequence and len(value) * times > MAX_REPEATED:
                raise jinja2.TemplateError(f"a value of more than {MAX_REPEATED} parts")
        if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= MAX_POWER):
            raise jinja2.TemplateError(f"a power of more than {MAX_POWER}")
        return super().call_binop(context, operator, left, right)

    def compile_timed(self, source: str) -> jinja2.Template:
        """The template of a source, in which every loop looks at the clock."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            line = loop.iter.lineno
            loop.iter = nodes.Filter(loop.iter, _TIMED, [], [], None, None, lineno=line)
        return self.from_string(tree)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.filters[_TIMED] = _TimedIterable
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


class ChatTemplate:
    """One compiled template and the special tokens that it may name.

    efforts: the words of reasoning effort that it knows, see `known_efforts`. takes_parts: whether
    it reads a message's content also as a list of parts; others get the parts
    joined into one text. takes_tools: whether it writes tools into the prompt. takes_systems:
    whether it writes several system messages, wherever they stand; others get those in front as
    one, and later ones as parts of the messages beside them.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], name: str = "chat template") -> None:
        """Raises CheckpointError if the source is not a template."""
        if not isinstance(source, str):
            raise CheckpointError(f"{name}: a template must be a text, not {type(source).__name__}")
        try:
            self._template = _environment().compile_timed(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{name}, line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{name}: {one_line(error)}") from None
        self.source = source
        self._name = name
        self._tokens = dict(tokens)
        self.takes_parts = self.takes_systems = True  # while that is tried
        self.takes_systems = self._probe_systems()
        self.takes_parts = self._probe()
        self.takes_tools = self._probe_tools()
        self.efforts = known_efforts(source, self._with_effort)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text; variables are the template's own, such as enable_thinking.

        continue_final_message: it ends where the last message's content does.
        Raises RequestError if the template refuses the messages.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false",
                param="continue_final_message",
            )
        values = {"tools": None, "documents": None, **self._tokens, **(variables or {})}
        read = [self._content(_named_reasoning(message)) for message in messages]
        if not self.takes_systems:
            read = one_system_message(read, continue_final_message)
        values["messages"] = read
        if continue_final_message:
            values["messages"][-1:] = map(_marked, values["messages"][-1:])
        values["add_generation_prompt"] = add_generation_prompt
        _deadline.at = monotonic() + RENDER_SECONDS
        try:
            text = self._template.render(values)
        except _TooSlowError:
            raise RequestError(
                f"the chat template takes over {RENDER_SECONDS:g} s for these messages",
                param="messages",
                code=_TOO_SLOW,
            ) from None
        except Exception as error:  # a template is a program, and raises what it likes
            raise RequestError(
                f"the chat template refuses these messages: {one_line(error)}", param="messages"
            ) from None

        if continue_final_message:
            return _until_mark(text, values["messages"][-1]["content"])
        return text

    def _content(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.takes_parts or not isinstance(message.get("content"), list):
            return message
        texts = [part["text"] for part in message["content"]]
        return {**message, "content": "\n".join(texts)}

    def _with_effort(self, word: str) -> str:
        values = {VARIABLE: word, "enable_thinking": True}
        return self.render([{"role": "user", "content": "text"}], variables=values)

    def _probe(self) -> bool:
        """Whether two text parts render like the one text that they make."""
        parts = [{"type": "text", "text": "left"}, {"type": "text", "text": "right"}]
        try:
            listed = self.render([{"role": "user", "content": parts}])
            return listed == self.render([{"role": "user", "content": "leftright"}])
        except RequestError as error:
            self._require_fast(error)
            return False

    def _require_fast(self, error: RequestError) -> None:
        """Raise CheckpointError for a template that is too slow for a single short message."""
        if error.code == _TOO_SLOW:
            raise CheckpointError(
                f"{self._name}: it takes over {RENDER_SECONDS:g} s for one short message"
            ) from None

    def _probe_tools(self) -> bool:
        """Whether a tool's name shows up in the prompt."""
        function = {"name": "probed_tool", "description": "", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": function}]
        try:
            text = self.render([{"role": "user", "content": "text"}], variables={"tools": tools})
        except RequestError as error:
            self._require_fast(error)
            return False
        return "probed_tool" in text

    def _probe_systems(self) -> bool:
        """Whether a second and a later system message show up in the prompt."""
        names = ("first", "second", "later")
        first, second, later = (
            {"role": "system", "content": f"system probe {name}"} for name in names
        )
        turn = [{"role": "user", "content": "text"}, {"role": "assistant", "content": "text"}]
        user = {"role": "user", "content": "text"}
        try:
            text = self.render([first, second, *turn, later, user])
        except RequestError:
            return False
        return all(f"system probe {name}" in text for name in names)


# Stands where the final message's content ends. Its last character, a space, tells whether the
# template trims the content.
_MARK = "\ue000the prompt ends here\ue001 "


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    """The final message with a mark behind its content."""
    content = message.get("content")
    if message.get("tool_calls"):
        raise RequestError(
            "continue_final_message: the last message calls tools, which no text can follow",
            param="continue_final_message",
        )
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    if isinstance(content, list) and content:
        *others, part = content
        return {**message, "content": [*others, {**part, "text": part["text"] + _MARK}]}
    raise RequestError(
        "continue_final_message needs a last message with a text", param="continue_final_message"
    )


def _until_mark(text: str, content: Any) -> str:
    """The prompt up to the end of its last message's content, as transformers cuts it."""
    given = content if isinstance(content, str) else content[-1]["text"]
    at = text.rfind(_MARK.rstrip())
    if at < 0 or given.removesuffix(_MARK).strip() not in text:
        raise RequestError(
            "continue_final_message needs a last message whose content the template shows",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _named_reasoning(message: Message) -> dict[str, Any]:
    """The message with its reasoning under the name that templates read, whichever it came by."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if message.get(name) is not None:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return dict(message)


def load_template(directory: Path, given: str | None = None) -> ChatTemplate | None:
    """The checkpoint's template, or None if it has none.

    given: another one instead, as a file or as its text. `chat_template.jinja` comes first, then
    `chat_template` of `tokenizer_config.json`. Raises CheckpointError.
    """
    config = read_json(directory / "tokenizer_config.json")
    if given is not None:
        return ChatTemplate(_given_source(given), _special_tokens(config), "--chat-template")
    path = directory / "chat_template.jinja"
    source: Any
    if path.is_file():
        try:
            name, source = str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
    else:
        name, source = f"{directory / 'tokenizer_config.json'}: chat_template", None
        source = config.get("chat_template")
    if isinstance(source, list):  # several, each with a name
        source = _named_templates(source, name).get("default")
    if source is None:
        return None
    return ChatTemplate(source, _special_tokens(config), name)


def _given_source(given: str) -> str:
    """A template that is a file's name or, with Jinja's braces or of several lines, itself."""
    if "{{" in given or "{%" in given or "\n" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"--chat-template {given}: neither a file that can be read ({error}) nor a template"
        ) from None


def _named_templates(entries: list[Any], name: str) -> dict[str, Any]:
    """Template by name. Raises CheckpointError."""
    found = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise CheckpointError(f'{name}: each entry must be {{"name": ..., "template": ...}}')
        found[entry["name"]] = entry.get("template")
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _TOKEN_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return tokens
