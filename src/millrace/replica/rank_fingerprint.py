"""What must be the same on every rank of a group, as short texts to compare at the start.

A group whose ranks run other code, other options or other weights computes nonsense without any
error; so each fact has a name that says what to put right. Reads files, no tensor.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from millrace.config import EngineArgs
from millrace.version import __version__

# Options that may differ: they name things on one host, or concern rank 0 alone.
_OWN = {"model", "tokenizer", "served_model_name", "tensor_parallel_size", "plan_log", "max_queue"}
# What ranks run, as patterns within the package.
_RUN = ("model/**/*.py", "runtime/**/*.py", "kernels/**/*.py", "protocol.py", "config.py")
_SAMPLES, _SAMPLE = 16, 4096  # places read of each weight file, and bytes at each


def facts(args: EngineArgs, model: Path, device: str, one_install: bool) -> dict[str, str]:
    """Name -> value; device: what the ranks run on, such as "cpu" or a GPU's name.

    one_install: rank 0 started the others from its own files, which need no comparison.
    """
    import torch

    options = {
        field.name: _text(getattr(args, field.name))
        for field in msgspec.structs.fields(EngineArgs)
        if field.name not in _OWN
    }
    return {
        "millrace": __version__ + ("" if one_install else f" ({_source_digest()})"),
        "torch": str(torch.__version__),
        "device": device,
        "model": f"{model.name} ({model_digest(model, args.load_format != 'dummy')})",
        **options,
    }


def model_digest(directory: Path, weights: bool) -> str:
    """A digest of the configuration and, with `weights`, of samples of every weight file."""
    found = hashlib.blake2b(digest_size=6)
    found.update((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")) if weights else []:
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE))
    return found.hexdigest()


def _source_digest() -> str:
    """A digest of the source that a rank runs."""
    root = Path(__file__).parents[1]
    found = hashlib.blake2b(digest_size=4)
    files = [path for part in _RUN for path in root.glob(part)]
    for path in sorted(files):
        found.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return found.hexdigest()


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
