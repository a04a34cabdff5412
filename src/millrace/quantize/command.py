"""The options of `millrace quantize`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from millrace.errors import ConfigError

MOST_TOKENS = 1 << 20


@click.command("quantize", help="Write a quantized checkpoint of a model that is not quantized.")
@click.argument("model")
@click.option("--to", type=click.Choice(["fp8", "int4"]), required=True,
              help="fp8: e4m3 with scales for blocks of 128 x 128. int4: groups of columns, in the "
              "layout of compressed-tensors.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Directory to write [the model's name, with -fp8 or -int4 behind].")  # fmt: skip
@click.option("--group-size", type=click.IntRange(8), default=128, show_default=True,
              help="Columns that share a scale, of int4: a multiple of 8.")  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A text that the model reads, for GPTQ to keep its outputs; without it, values "
              "are rounded to the nearest.")  # fmt: skip
@click.option("--calibration-tokens", type=click.IntRange(1, MOST_TOKENS), default=32768,
              show_default=True, help="Tokens of it to read.")  # fmt: skip
@click.option("--context", type=click.IntRange(16), default=1024, show_default=True,
              help="Tokens that it is read at once.")  # fmt: skip
def quantize(**options: Any) -> None:
    from millrace.model_lookup import find_model
    from millrace.quantize.checkpoint import Target, quantize_checkpoint

    if options["group_size"] % 8:
        raise ConfigError(f"--group-size {options['group_size']}: use a multiple of 8, such as 128")
    if options["calibration"] and options["to"] == "fp8":
        raise ConfigError("--calibration: FP8 is rounded to the nearest; leave it out")
    source = find_model(options["model"])
    out = options["out"] or Path(f"{source.name}-{options['to']}")
    prompts = _prompts(source, options) if options["calibration"] else []
    target = Target(options["to"], options["group_size"], prompts)
    found = quantize_checkpoint(source, out, target)
    click.echo(
        f"{out}: {found.layers} layers quantized, {found.before / 2**20:.1f} MiB became "
        f"{found.after / 2**20:.1f} MiB; error of the weights {found.error:.2%}"
    )


def _prompts(source: Path, options: dict[str, Any]) -> list[list[int]]:
    """The text's tokens, cut into prompts."""
    from millrace.text.tokenizer import Tokenizer

    try:
        text = options["calibration"].read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{options['calibration']} cannot be read as text: {error}") from None
    ids = Tokenizer.load(source).encode(text)[: options["calibration_tokens"]]
    if not ids:
        raise ConfigError(f"{options['calibration']} is empty; give a text like those to be served")
    size = options["context"]
    return [ids[first : first + size] for first in range(0, len(ids), size)]
