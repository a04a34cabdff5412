"""Grammars in the engine: what has passed the sandbox cannot overflow a stack here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from millrace.common.native_stack import CHECK_STACK, COMPILE_STACK
from millrace.engine.grammar import Grammars
from millrace.errors import RequestError
from millrace.protocol import AddRequest, Grammar, SamplingParams

COMPILE = """
import json, sys
from pathlib import Path
from millrace.engine.grammar import Grammars
from millrace.protocol import AddRequest, Grammar, SamplingParams
from millrace.text.grammar_jobs import OutputGrammar
from millrace.protocol import StructuredOutputs

names = [f"a{at}" for at in range(990)]
definitions = {a: {"items": {"items": {"$ref": f"#/$defs/{b}"}}} for a, b in zip(names, names[1:])}
schema = {"$defs": {**definitions, names[-1]: {"type": "string"}}, "$ref": "#/$defs/a0"}
source = OutputGrammar(StructuredOutputs(json=schema), "f", gap=False).build()
grammars = Grammars(Path(sys.argv[1]), 600, [2], 1)
request = AddRequest("a", [1], SamplingParams(), grammar=Grammar(source))
state = grammars.compile(request).result(60)
grammars.add("a", state)
assert grammars.failure("a") is None
grammars.close()
"""


def test_a_deep_grammar_that_passed_the_check_compiles_in_an_engine(text_model: Path) -> None:
    """Its compilation takes more stack than a thread has by default."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(text_model / "tokenizer.json")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert COMPILE_STACK >= 4 * CHECK_STACK


def test_a_tokenizer_that_does_not_fit_the_model_refuses_grammars(text_model: Path) -> None:
    """It must not end the engine: its vocabulary is larger than the model's."""
    grammars = Grammars(text_model / "tokenizer.json", 32, [2], 1)
    request = AddRequest("a", [1], SamplingParams(), grammar=Grammar('start: "a"'))
    with pytest.raises(RequestError, match="do not work with this model's tokenizer: vocab size"):
        grammars.compile(request).result(60)
    grammars.close()


def test_a_grammar_that_fails_at_its_first_mask_is_refused_before_a_step(text_model: Path) -> None:
    grammars = Grammars(text_model / "tokenizer.json", 600, [2], 1)
    letters = " | ".join(f'"{chr(97 + number % 26)}"' for number in range(1900))
    request = AddRequest("a", [1], SamplingParams(), grammar=Grammar(f"start: x+\nx: {letters}"))
    with pytest.raises(RequestError, match="grammar: parser error: Too many items"):
        grammars.compile(request).result(60)
    grammars.close()
