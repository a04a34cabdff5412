"""Trains the byte-level BPE on generated text and writes the tokenizer and template files.

    python models/mini/make_tokenizer.py models/millrace-mini

Qwen's special tokens and its way of splitting text, with 4,096 tokens in all: each digit is a
token, so a number is read and written a digit at a time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from data import HERE, draw_pieces, template
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from millrace.tasks import wording

VOCAB_SIZE = 4096
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>",
           "</think>")  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLES = 6000


def _texts() -> Iterator[str]:
    render, rng = template(), random.Random(20)
    for _ in range(SAMPLES):
        yield "".join(text for text, _ in draw_pieces(render, rng, math_share=0.1))
    for words in (wording.FIRST_NAMES, wording.LAST_NAMES, wording.SYLLABLES):
        yield from words


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    if tokenizer.get_vocab_size() < VOCAB_SIZE - len(CONTROL) - len(MARKERS):
        print(f"only {tokenizer.get_vocab_size()} tokens were worth making")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    tokenizer.save(str(directory / "tokenizer.json"))
    chat_template = (HERE / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(chat_template)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{directory}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
