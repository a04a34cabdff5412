"""Items: the same for the same seed, never shared by the splits, and graded rightly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from millrace.errors import UserError
from millrace.tasks import TASKS, find_task, make_items
from millrace.tasks.arithmetic import add_steps, multiply_steps, subtract_steps
from millrace.tasks.items import Item, is_heldout, visible


@pytest.mark.parametrize("name", sorted(TASKS))
def test_items_depend_on_seed_and_index_alone(name: str) -> None:
    items = make_items(name, 40, seed=3)
    assert make_items(name, 10, seed=3) == items[:10]
    assert TASKS[name].make(7, 3, "heldout") == items[7]
    assert make_items(name, 40, seed=4) != items


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_reference_answer_is_right_and_others_are_not(name: str) -> None:
    for item in make_items(name, 60, seed=0):
        said = item.answer + "".join(map(_call, item.tool_calls))
        said = obedient(json.loads(said)) if name == "instructions" else said
        task = TASKS[name]
        assert task.grade(item, said).correct
        assert task.grade(item, f"<think>\n{item.reasoning}\n</think>\n\n{said}").correct
        assert not task.grade(item, "").correct
        if name != "instructions":
            assert not task.grade(item, said + " 17").correct


def obedient(rules: list[dict[str, Any]]) -> str:
    """A text that keeps some rules, made without the code that checks them."""
    rule = {one["kind"]: one for one in rules}
    word = rule.get("with_word", rule.get("word_times", {})).get("word", "")
    parts = ["word"] * 2 + [word] * rule.get("word_times", {"n": 1})["n"] * bool(word)
    if "at_least_words" in rule:
        parts += ["more"] * rule["at_least_words"]["n"]
    text = " ".join(parts)
    if "question_mark" in rule:
        text += " no?" * rule["question_mark"]["n"]
    if "bullets" in rule:
        return "\n".join(f"- {text if at == 0 else 'b'}" for at in range(rule["bullets"]["n"]))
    if "json_list" in rule:
        return json.dumps([text, *"b" * (rule["json_list"]["n"] - 1)])
    if "paragraphs" in rule:
        text += "\n\nmore" * (rule["paragraphs"]["n"] - 1)
    text = rule.get("begins_with", {"word": ""})["word"] + " " + text
    text = "[[a]]\n" + text if "title" in rule else text
    text += " " + rule.get("ends_with", {"word": ""})["word"]
    return text.upper() if "upper_case" in rule else text


def test_a_text_that_breaks_a_rule_is_wrong() -> None:
    """Of each kind: a text made for the other rules of an item does not keep it."""
    kinds = set()
    for item in make_items("instructions", 400, seed=1):
        rules = json.loads(item.answer)
        for rule in rules:
            broken = BREAK.get(rule["kind"], lambda text, rule: obedient([]))
            text = broken(obedient(rules), rule)
            grade = TASKS["instructions"].grade(item, text)
            assert not grade.correct, (rule, text)
            assert not grade.fields[rule["kind"]], (rule, text)
            kinds.add(rule["kind"])
    assert len(kinds) == 15


# What makes a text break a rule; of the others a text without any rule does.
BREAK: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "at_most_words": lambda text, rule: text + " more" * rule["n"],
    "no_comma": lambda text, rule: text + ",",
    "question_mark": lambda text, rule: text + "?",
    "lower_case": lambda text, rule: text + " A",
    "upper_case": lambda text, rule: text + " a",
    "without_letter": lambda text, rule: text + f" a{rule['word']}a",
    "word_times": lambda text, rule: f"{text} {rule['word']}",
    "bullets": lambda text, rule: text + "\n- one more",
    "paragraphs": lambda text, rule: text + "\n\none more",
}


def _call(call: dict[str, dict[str, dict[str, str]]]) -> str:
    from millrace.tasks.chat import call_text

    return call_text(call)


def test_an_unknown_task_names_those_there_are() -> None:
    with pytest.raises(UserError, match="policy, math, chat"):
        find_task("poetry")


# --- disjointness --------------------------------------------------------------------------------


def _holder(item: Item) -> str | None:
    return json.loads(item.answer).get("policyholder")


def test_policies_of_train_and_heldout_share_no_holder_and_no_number() -> None:
    for key in ("policyholder", "policy_number"):
        values = {
            split: {json.loads(i.answer).get(key) for i in make_items("policy", 1500, 0, split)}
            for split in ("train", "heldout")
        }
        assert len(values["train"]) > 300
        assert values["train"] & values["heldout"] <= {None}
        assert all(is_heldout(v) for v in values["heldout"] if v)


def test_no_heldout_sum_is_ever_trained_on() -> None:
    def sums(split: str) -> set[tuple[str, ...]]:
        items = make_items("math", 4000, 0, split)  # type: ignore[arg-type]
        found = set()
        for item in items:
            asked = str(item.messages[0]["content"])
            found.add((item.kind, *re.findall(r"\d+", asked)))
        return found

    # "Subtract 3 from 5" and "5 - 3" name one sum in two orders; the pair decides either way.
    assert not sums("train") & {s for s in sums("heldout") if s[0] == "add"}


# --- policies ------------------------------------------------------------------------------------


def test_every_policy_answer_can_be_found_in_its_document() -> None:
    for item in make_items("policy", 400, seed=5):
        text, answer = str(item.messages[-1]["content"]), json.loads(item.answer)
        for key in ("policyholder", "policy_number", "quote"):
            if answer.get(key):
                assert answer[key] in text
        for phrase in (*answer.get("covered_perils", ()), *answer.get("exclusions", ())):
            assert phrase in text
        clause = answer.get("clause") or answer.get("washing_machine", {}).get("clause")
        if isinstance(clause, str):
            assert re.search(rf"(?m)^\W*(Clause |Art\. )?{re.escape(clause)}\W", text), (
                clause,
                text,
            )


def test_documents_have_the_length_that_was_asked_for() -> None:
    words = [len(str(i.messages[-1]["content"]).split()) for i in make_items("policy", 300, 1)]
    assert min(words) > 50
    assert max(words) > 250


def test_policies_are_graded_field_by_field() -> None:
    item = next(i for i in make_items("policy", 50, 0) if i.kind == "extract")
    answer = json.loads(item.answer)
    answer["deductible"] = -1
    del answer["currency"]
    grade = TASKS["policy"].grade(item, json.dumps(answer))
    assert not grade.correct
    assert {name for name, right in grade.fields.items() if not right} == {"deductible", "currency"}
    extra = {**json.loads(item.answer), "colour": "red"}
    grade = TASKS["policy"].grade(item, json.dumps(extra))
    assert not grade.correct
    assert all(grade.fields.values())
    fenced = f"```json\n{json.dumps(json.loads(item.answer), indent=2)}\n```"
    assert TASKS["policy"].grade(item, fenced).correct
    assert not any(TASKS["policy"].grade(item, "[1, 2]").fields.values())


# --- arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0, 1, 9, 10, 99, 105, 347, 999])
@pytest.mark.parametrize("b", [0, 1, 8, 11, 90, 285, 999])
def test_reasoning_ends_in_the_right_number_and_every_step_holds(a: int, b: int) -> None:
    for steps, value in (
        (add_steps(a, b), a + b),
        (subtract_steps(a, b), a - b),
        (multiply_steps(a, b), a * b if b else 0),
    ):
        assert steps.endswith(f"-> {value}")
        for left, right in re.findall(r"(?<![\d.>])(\d[\d+*-]*)=(\d+)", steps):
            assert eval(left) == int(right), steps  # digits and signs alone


@pytest.mark.parametrize(
    ("text", "right"),
    [("1,234", True), ("The answer is 1234.", True), ("1234 or 1235", False), ("-1234", False)],
)
def test_an_arithmetic_answer_is_its_only_number(text: str, right: bool) -> None:
    item = Item("math", "add", 0, (), "1234")
    assert TASKS["math"].grade(item, text).correct is right


def test_visible_is_what_follows_the_reasoning() -> None:
    assert visible("<think>\n3</think>\n\n4 ") == "4"
    assert visible("3\n</think>\n\n4") == "4"
    assert visible("4") == "4"
