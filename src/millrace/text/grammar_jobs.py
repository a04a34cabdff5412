"""Grammars that are to be built, as plain data that can be sent to another process.

A grammar that is nested too deeply can overflow the native stack of the process that compiles it.
So the server builds grammars in a disposable process (`millrace.server.sandbox`); the Python API
builds them in its own. What a grammar looks like is known in `grammar` and `tool_grammar`.
"""

from __future__ import annotations

import msgspec

from millrace.protocol import StructuredOutputs
from millrace.text.grammar import output_grammar, output_rules
from millrace.text.tool_grammar import tool_call_grammar
from millrace.text.tools.schema import ToolChoice
from millrace.text.tools.schema_dialects import Strictness


class OutputGrammar(msgspec.Struct, frozen=True, tag="output"):
    """The grammar of structured outputs. field: the client's name for them. gap: line breaks may
    precede the output. strictness: of a schema."""

    wanted: StructuredOutputs
    field: str
    gap: bool
    strictness: Strictness = "plain"

    def build(self) -> str:
        """The grammar's source. Raises RequestError that says what is wrong, and where."""
        return output_grammar(self.wanted, self.field, self.gap, self.strictness)


class ToolCallGrammar(msgspec.Struct, frozen=True, tag="tools"):
    """The grammar of an answer that may or must call tools.

    as_json: whether calls are written as JSON, else as XML. gap: line breaks may precede the
    answer. token_ids: of markers that are one token. output: what an answer without calls must
    match; None: nothing. Where every answer calls, it is only checked.
    """

    choice: ToolChoice
    as_json: bool
    gap: bool
    token_ids: dict[str, int]
    output: OutputGrammar | None = None

    def build(self) -> str:
        """The grammar's source. Raises RequestError that says what is wrong, and where."""
        body = None
        if self.output is not None:
            output = self.output
            output.build()  # for its error message, which names the field
            if self.choice.mode != "required":
                body = output_rules(output.wanted, output.field, output.strictness)
        return tool_call_grammar(self.choice, self.as_json, self.gap, self.token_ids.get, body)


GrammarJob = OutputGrammar | ToolCallGrammar
