"""What must be the same on every rank of a group, as short texts that are compared at the start.

A group whose ranks run different code, options or weights computes nonsense without an error. Each
fact has a name that says what to correct. This module reads files, but no tensors.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from millrace.config import EngineArgs
from millrace.version import __version__

# Options that may differ: they name things of one host, or only rank 0 uses them.
_OWN = {
    *("model", "revision", "download_dir", "tokenizer", "served_model_name"),
    *("tensor_parallel_size", "plan_log", "max_queue"),
}
# The source that ranks run, as patterns in the package.
_RUN = ("model/**/*.py", "runtime/**/*.py", "kernels/**/*.py", "protocol.py", "config.py")
_SAMPLES, _SAMPLE = 16, 4096  # samples of each weight file, and bytes of each


def facts(args: EngineArgs, model: Path, device: str, one_install: bool) -> dict[str, str]:
    """The facts by name. device: "cpu", or the name of the GPU.

    one_install: rank 0 started the other ranks, from the same files; so the source is not compared.
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
