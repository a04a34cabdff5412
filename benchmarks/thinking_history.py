"""What chat templates cost that keep reasoning in the history, or drop it.

A modelled session: the user writes three times, and after each of it the agent calls a tool three
times; every answer reasons first. Its prompts and answers are sent to an engine in this process, as
each template writes them, and the prompt tokens are counted that the prefix cache did not have.
New are the tokens of the system prompt, of the user and of the tool's results.

    python benchmarks/thinking_history.py
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

from millrace.config import engine_args
from millrace.engine.engine import Engine
from millrace.model_lookup import find_model
from millrace.protocol import AddRequest, SamplingParams
from millrace.replica.build import build_engine
from millrace.text.tokenizer import Tokenizer

USER_TURNS, STEPS = 3, 3
REASONING, ANSWER, RESULT, QUESTION = 24, 6, 24, 12  # words of five tokens


@dataclass
class Message:
    role: str
    text: str
    reasoning: str = ""


class Session:
    """The messages of a session, and its prompts under one template. keeps: the history's reasoning
    that the template writes: all of it, that since the user's last message, or none."""

    def __init__(self, keeps: str, tokenizer: Tokenizer) -> None:
        self._keeps, self._tokenizer = keeps, tokenizer
        self._random = random.Random(5)
        self.messages: list[Message] = []
        self.new = self.computed = self.prompts = 0
        self.say("system", 60)

    def words(self, count: int) -> str:
        return " ".join(f"{self._random.randrange(10_000)}" for _ in range(count))

    def say(self, role: str, words: int) -> None:
        self.messages.append(Message(role, self.words(words)))
        self.new += len(self._tokenizer.encode(self.messages[-1].text))

    def prompt(self) -> list[int]:
        last = max((i for i, m in enumerate(self.messages) if m.role == "user"), default=0)
        parts = []
        for place, message in enumerate(self.messages):
            kept = self._keeps == "all" or (self._keeps == "since" and place > last)
            thought = (
                f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning and kept else ""
            )
            parts.append(f"<|im_start|>{message.role}\n{thought}{message.text}<|im_end|>\n")
        return self._tokenizer.encode("".join(parts) + "<|im_start|>assistant\n<think>\n")

    def answer(self, engine: Engine) -> None:
        """The engine computes the prompt, and takes a given answer for its own."""
        message = Message("assistant", self.words(ANSWER), self.words(REASONING))
        text = f"{message.reasoning}\n</think>\n\n{message.text}<|im_end|>"
        prompt, tokens = self.prompt(), self._tokenizer.encode(text)
        self.prompts += 1
        params = SamplingParams(max_tokens=len(tokens), temperature=0.0, ignore_eos=True)
        ends = self._tokenizer.turn_ends(prompt)
        engine.add(
            AddRequest(f"{self.prompts}", prompt, params, boundaries=ends, resume=tokens[:-1])
        )
        cached = 0
        while engine.has_work():
            cached += sum(d.cached_tokens for d in engine.step() if d.finish_reason)
        self.computed += len(prompt) - cached
        self.messages.append(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="millrace-mini")
    options = parser.parse_args()
    model = find_model(options.model)
    tokenizer = Tokenizer.load(model)
    for keeps in ("all", "since", "none"):
        engine = build_engine(engine_args(model=str(model), max_num_seqs=1, num_snapshots=64))
        session = Session(keeps, tokenizer)
        for _ in range(USER_TURNS):
            session.say("user", QUESTION)
            session.answer(engine)
            for _ in range(STEPS):
                session.say("tool", RESULT)
                session.answer(engine)
        ratio = session.computed / session.new
        print(f"{keeps}: {session.new} new, {session.computed} computed, ratio {ratio:.2f}")
        engine.close()


if __name__ == "__main__":
    main()
