"""Grammars in the engine: what has passed the sandbox cannot overflow a stack here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from millrace.common.native_stack import CHECK_STACK, COMPILE_STACK
from millrace.engine import grammar
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


def compiled(text_model: Path, *names: str) -> Grammars:
    grammars = Grammars(text_model / "tokenizer.json", 600, [2], 1)
    for name in names:
        request = AddRequest(name, [1], SamplingParams(), grammar=Grammar('start: "a"+'))
        grammars.add(name, grammars.compile(request).result(60))
    return grammars


def test_a_first_mask_that_takes_too_long_is_refused(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "SLOW_SECONDS", -1.0)
    with pytest.raises(RequestError, match="grammar: it takes too long to find the tokens"):
        compiled(text_model, "a")


def test_a_grammar_whose_masks_take_too_long_is_found_and_ended(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a step was slow, the next one times each grammar."""
    grammars = compiled(text_model, "a", "b")
    plan: Any = SimpleNamespace(decode=[1, 2], step=1, drafts=-1)
    rows = [(0, "a"), (1, "b")]
    usual = grammars.masks(plan, rows).words
    monkeypatch.setattr(grammar, "SLOW_SECONDS", -1.0)
    assert grammars.masks(plan, rows).words == usual
    assert grammars.failure("a") is grammars.failure("b") is None
    assert grammars.masks(plan, rows).words == usual
    assert "takes too long" in str(grammars.failure("a"))
    assert "takes too long" in str(grammars.failure("b"))
    grammars.close()


def test_alternatives_that_begin_and_end_alike_cost_one_request(text_model: Path) -> None:
    """Each mask of this one takes seconds."""
    grammars = Grammars(text_model / "tokenizer.json", 600, [2], 1)
    source = "start: a\na: " + "a a | " * 500 + '"x"'
    request = AddRequest("a", [1], SamplingParams(), grammar=Grammar(source))
    try:
        state = grammars.compile(request).result(60)
    except RequestError:
        return  # a slow machine
    grammars.add("a", state)
    plan: Any = SimpleNamespace(decode=[1], step=1, drafts=-1)
    for _ in range(10):
        row = np.frombuffer(grammars.masks(plan, [(0, "a")]).words, np.uint8)
        if grammars.failure("a"):
            return
        allowed = np.unpackbits(row, bitorder="little").nonzero()[0]
        grammars.advance("a", [int(allowed[-1])], [])
    pytest.fail("it went on")
