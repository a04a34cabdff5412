"""Grammars in EBNF as llama.cpp and vLLM's users write them."""

from __future__ import annotations

import pytest

from millrace.errors import RequestError
from millrace.protocol import StructuredOutputs
from millrace.text.gbnf import is_gbnf
from millrace.text.grammar import output_grammar
from tests.text.test_grammar import accepts

SQL = """
root ::= select-statement   # a comment
select-statement ::= "SELECT " column " from " table
    | "SELECT * from " table

column ::= "col_1" | "col_2"
table ::= "t" [0-9]{1,2}
"""


def source(grammar: str) -> str:
    return output_grammar(StructuredOutputs(grammar=grammar), "structured_outputs", gap=False)


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (SQL, "SELECT col_2 from t12", "SELECT col_3 from t1"),
        (SQL, "SELECT * from t1", "SELECT * from t"),
        ('root ::= "(" root ")" | ""', "(())", "(()"),
        (r'root ::= [^"\\]+ "\""', 'ab"', '"'),
        (r'root ::= "\u4e2d" [\u00e9-\u00ff] "\t"', "中é\t", "中e\t"),
        (r'root ::= "\u0009\x41"', "\tA", "A"),
        (r'root ::= "\\u0041"', r"\u0041", "A"),
        ('root ::= item ("," item)*\nitem ::= [a-z]? "x"', "ax,x", "a,"),
    ],
)
def test_what_ebnf_accepts(grammar: str, right: str, wrong: str) -> None:
    assert is_gbnf(grammar)
    assert accepts(source(grammar), right)
    assert not accepts(source(grammar), wrong)


def test_lark_is_not_taken_for_ebnf() -> None:
    assert not is_gbnf('start: "a ::= b"\n')
    assert accepts(source('start: "a ::= b"'), "a ::= b")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("root ::= missing", "missing"),
        ('top ::= "a"', "root"),
        ('root ::= "a', "end of input"),
        ('root ::= "a" {', "[Ee]xpected"),
        ("root ::= " + "(" * 100_000, "nested too deeply"),
        ("root ::= " + " ".join(f"r{i}" for i in range(1001))
         + "".join(f'\nr{i} ::= "a" r{i} | "b"' for i in range(1001)), "at most 1000"),
    ],
)  # fmt: skip
def test_wrong_ebnf_is_refused_with_the_reason(grammar: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        source(grammar)
    assert caught.value.code == "invalid_grammar"
    assert str(caught.value).startswith("structured_outputs.grammar")
