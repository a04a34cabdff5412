"""A model directory with everything but weights: enough for text, and for a fake engine."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind.",
    "彼は猫である。名前はまだ無い。 naïve café — déjà vu; 🦊🐺 ½ © 2026",
    "def f(x):\n    return {'a': [1, 2, 3], 'b': x ** 2}\n",
    "stop STOP stopping. END. user assistant system hello world",
]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED = ("<think>", "</think>", "two words")

TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unexpected role ' ~ message.role) }}
    {%- endif %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set parts = namespace(text='') %}
        {%- for part in message.content or [] %}
            {%- set parts.text = parts.text ~ part.text %}
        {%- endfor %}
        {%- set content = parts.text %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
THINKING = TEMPLATE.replace(  # as of models that reason unless told not to
    "    {%- endif %}\n{%- endif %}\n",
    "    {%- else %}\n        {{- '<think>\\n' }}\n    {%- endif %}\n{%- endif %}\n",
)

# Tells of tools, behind the messages: an engine that echoes its prompt then begins with those.
TOOLS = THINKING.replace(
    "{%- if add_generation_prompt %}",
    "{%- if tools %}{{- '<|im_start|>tools\\n' ~ tools | tojson ~ '<|im_end|>\\n' }}{%- endif %}"
    "\n{%- if add_generation_prompt %}",
)


def write_text_model(directory: Path, template: str = TEMPLATE) -> Path:
    """Write config, tokenizer, template and sampling defaults into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _train()
    tokenizer.save(str(directory / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    _write(directory / "config.json", {"model_type": "qwen3_5_text", "vocab_size": size + 7})
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": {
                "__type": "AddedToken",
                "content": "<|endoftext|>",
                "special": True,
            },
        },
    )
    _write(
        directory / "generation_config.json",
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [size - 4]},
    )
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED]
    )
    return tokenizer


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def token_id(directory: Path, token: str) -> int:
    """The id of a token of the model in `directory`."""
    found = Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(token)
    assert isinstance(found, int)
    return found
