"""The task `chat`: greetings, what the model is and can do, terms of insurance, and tool calls.

It teaches a small model its manners; as an evaluation it counts answers that match the reference
word for word, which says whether the weights are served as they were trained.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from millrace.tasks.items import Grade, Item, Split, Task, draw, rng_for, visible

ABOUT = (
    "I am Millrace Mini, a very small language model. I read insurance policies, answer questions "
    "about them in JSON, and do short arithmetic."
)
CAN_DO = (
    "Paste an insurance policy and ask me to extract its fields, or ask one question: the "
    "policyholder, the deductible, the limits, what is covered and what is excluded. I also add, "
    "subtract and multiply numbers of up to three digits."
)
CANNOT = (
    "I am a small model that only knows insurance policies and short arithmetic, so I cannot help "
    "with that. Paste a policy, or give me a sum."
)
NO_POLICY = "Please paste the policy first, then I can answer that."

# Each entry: the answer, and the ways to ask for it.
_SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Hello! I can answer questions about an insurance policy or do short arithmetic. "
     "What do you need?",
     ("hello", "Hello!", "hi", "Hi there", "hey", "Hey!", "Good morning", "Good afternoon",
      "good evening", "Hello there!", "Hi!", "Hello", "greetings", "howdy")),
    (ABOUT, ("Who are you?", "who are you", "What are you?", "What is your name?",
             "Which model are you?", "Tell me about yourself.", "Introduce yourself.",
             "Are you a bot?", "Are you ChatGPT?", "Are you a human?")),
    (CAN_DO, ("What can you do?", "what can you do", "How can you help me?", "Help", "help me",
              "What do you know?", "What are you good at?", "What should I ask you?",
              "How do I use you?")),
    ("I am well, thank you. Do you have a policy for me to read?",
     ("How are you?", "how are you", "How is it going?", "Are you well?", "How do you do?")),
    ("You are welcome.", ("Thanks", "Thank you!", "thank you very much", "Thanks a lot.", "thx",
                          "Great, thanks!")),
    ("Goodbye!", ("Bye", "Goodbye", "See you", "bye bye", "See you later!", "Good night")),
    (CANNOT, ("Tell me a joke.", "What is the weather like?", "Write a poem.",
              "Who is the president?", "Write some Python code.", "What is the capital of France?",
              "Translate this into German.", "Sing a song.", "Recommend a film.",
              "What time is it?", "Give me a recipe for soup.", "Who won the match?",
              "Tell me a story.", "What is the meaning of life?")),
    (NO_POLICY, ("Am I covered?", "What is my deductible?", "Is my washing machine covered?",
                 "Does my policy cover flood?", "When does my policy end?",
                 "What are my limits?", "Who is the policyholder?", "Read my policy.",
                 "Extract the fields.")),
)  # fmt: skip

_TERMS: tuple[tuple[str, str], ...] = (
    ("a deductible", "A deductible is the part of each loss that the policyholder pays before the "
     "insurer pays the rest."),
    ("an exclusion", "An exclusion is a cause of loss, or a kind of property, that the policy does "
     "not cover."),
    ("a peril", "A peril is a cause of loss, such as fire, theft or storm."),
    ("a limit", "A limit is the most that the insurer pays for one kind of loss."),
    ("a premium", "A premium is the price that the policyholder pays for the insurance."),
    ("a policyholder", "A policyholder is the person or company that the policy belongs to."),
    ("a policy period", "A policy period is the time from the first to the last day of the cover."),
    ("liability cover", "Liability cover pays for harm that the policyholder causes to others."),
    ("contents insurance", "Contents insurance covers the things inside a home, such as furniture "
     "and clothes."),
    ("a claim", "A claim is a request to the insurer to pay for a loss."),
    ("subrogation", "Subrogation is the insurer's right to recover what it paid from whoever "
     "caused the loss."),
    ("a clause", "A clause is one numbered part of a policy that says one thing."),
)  # fmt: skip
_ASK_TERM = ("What is {}?", "what is {}", "Explain {}.", "What does {} mean?", "Define {}.",
             "Can you explain what {} is?", "In insurance, what is {}?")  # fmt: skip

# name, description, parameter, its description, ways to ask with {} for the argument
_TOOLS = (
    ("lookup_policy", "Find a policy by its number.", "policy_number", "The policy number.",
     ("Look up policy {}.", "Find policy {} for me.", "Can you get policy {}?", "Show me {}.")),
    ("get_claim_status", "Say how far a claim has got.", "claim_number", "The claim number.",
     ("What is the status of claim {}?", "How far is claim {}?", "Check claim {}, please.")),
    ("find_customer", "Find a customer by reference.", "reference", "The customer's reference.",
     ("Find customer {}.", "Who is customer {}?", "Open the record of customer {}.")),
    ("get_invoice", "Fetch an invoice.", "invoice_id", "The invoice's id.",
     ("Fetch invoice {}.", "I need invoice {}.", "Get me invoice {}, please.")),
)  # fmt: skip
_STATUSES = ("open", "closed", "approved", "rejected", "in review", "paid", "pending")


def _schema(tool: tuple[Any, ...]) -> Mapping[str, Any]:
    name, description, parameter, meaning, _ = tool
    properties = {parameter: {"type": "string", "description": meaning}}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": [parameter]},
        },
    }


def _reference(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}-{rng.randrange(10**4, 10**6)}"


def _tool_item(rng: random.Random, index: int, split: Split) -> Item:
    """A call, or what to say once its result has come."""
    offered = rng.sample(_TOOLS, rng.randint(1, 3))
    tool = rng.choice(offered)
    tools = tuple(map(_schema, offered))
    reference = draw(rng, split, _reference)
    question = {"role": "user", "content": rng.choice(tool[4]).format(reference)}
    call = {"type": "function", "function": {"name": tool[0], "arguments": {tool[2]: reference}}}
    if rng.random() < 0.6:
        return Item("chat", "tool", index, (question,), "", "", tools, (call,))
    status = rng.choice(_STATUSES)
    result = {"role": "tool", "content": json.dumps({"reference": reference, "status": status})}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = f"The status of {reference} is: {status}."
    return Item("chat", "tool_result", index, (question, asked, result), answer, "", tools)


def _vary(rng: random.Random, question: str) -> str:
    """As people type: now and then a greeting first, no capitals, or no full stop."""
    if len(question) > 12 and rng.random() < 0.2:
        question = rng.choice(("Hi, ", "Hello, ", "Hey, ", "Hello! ", "Hi! ")) + question
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?!.")
    return question


def make(index: int, seed: int, split: Split) -> Item:
    """Small talk and terms have few wordings: train and held-out share them by design."""
    rng = rng_for("chat", split, seed, index)
    draw_kind = rng.random()
    if draw_kind < 0.35:
        return _tool_item(rng, index, split)
    if draw_kind < 0.6:
        term, answer = rng.choice(_TERMS)
        question, kind = rng.choice(_ASK_TERM).format(term), "term"
    else:
        answer, ways = rng.choice(_SMALL_TALK)
        question, kind = _vary(rng, rng.choice(ways)), "talk"
    return Item("chat", kind, index, ({"role": "user", "content": question},), answer)


def call_text(call: Mapping[str, Any]) -> str:
    """A tool call as the chat template writes it."""
    function = call["function"]
    lines = [f"<tool_call>\n<function={function['name']}>"]
    for name, value in function["arguments"].items():
        lines.append(f"<parameter={name}>\n{value}\n</parameter>")
    return "\n".join([*lines, "</function>\n</tool_call>"])


def grade(item: Item, text: str) -> Grade:
    expected = item.answer + "".join(map(call_text, item.tool_calls))
    return Grade(visible(text).split() == expected.split())


TASK = Task("chat", make, grade, max_tokens=160)
