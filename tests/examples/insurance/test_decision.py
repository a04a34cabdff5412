"""A decision is kept as far as its sources bear it out, and no further."""

from __future__ import annotations

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.insurance.assistant.decision import (
    COVERED,
    UNDECIDED,
    Decision,
    checked,
    parse,
    reference,
    schema,
    sums_in,
)

CLAUSES = {"1.2": "We pay for fire, up to EUR 5,000.", "E1": "We do not pay for hail."}
POLICY = "Policy HB-1, Home Basic, edition 2022. Deductible: EUR 250."
SUMS = st.none() | st.integers(0, 6000) | st.sampled_from([250, 5000])
DECISIONS = st.builds(
    Decision, st.sampled_from([None, "1.2", "E1", "9.9"]), st.sampled_from(COVERED), SUMS, SUMS,
    st.text(max_size=50),
)  # fmt: skip


@given(DECISIONS)
def test_what_is_kept_is_written_in_the_sources(said: Decision) -> None:
    kept = checked(said, CLAUSES, POLICY)
    assert kept.clause in (None, *CLAUSES)
    if kept.covered in ("yes", "no"):
        assert kept.clause is not None
    text = CLAUSES.get(kept.clause or "", "")
    assert kept.amount is None or kept.amount in sums_in(text)
    assert kept.deductible is None or kept.deductible in sums_in(text + POLICY)
    assert checked(kept, CLAUSES, POLICY) == kept or kept == UNDECIDED


@given(DECISIONS)
def test_a_decision_is_read_back_and_fits_its_schema(said: Decision) -> None:
    assert parse(said.to_json()) == said
    if said.clause != "9.9":
        import json

        jsonschema.validate(json.loads(said.to_json()), schema(list(CLAUSES)))


@pytest.mark.parametrize("verdict", ["yes", "no", "unclear"])
def test_references_stand(verdict: str) -> None:
    label = "1.2"
    right = reference(verdict, label, 5000, None, 250)
    assert checked(right, CLAUSES, POLICY) == right


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"clause": 1}', '{"clause": "1.2", "covered": "maybe"}']
)
def test_what_is_no_decision_is_none(text: str) -> None:
    assert parse(text) is None
