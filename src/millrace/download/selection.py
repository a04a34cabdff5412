"""Which files of a model are wanted.

Without patterns of the user's: all, but no weights of other formats where safetensors are there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch

from millrace.download.source import RemoteFile
from millrace.errors import UserError

OTHER_WEIGHTS = [
    *("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ckpt"),
    *("*.ot", "*.tflite", "original/*", "consolidated*"),
]
_KEPT = re.compile(r"(tokenizer|spiece|vocab).*\.(bin|pt)$")


def select(
    files: Sequence[RemoteFile], include: Sequence[str], exclude: Sequence[str]
) -> list[RemoteFile]:
    """The files to download, smallest first, so that what cannot work shows early.

    Raises UserError when no file is left.
    """
    if not files:
        raise UserError("there are no files; check the name of the folder, and the revision")
    chosen = [file for file in files if not include or _matches(file.name, include)]
    chosen = [file for file in chosen if not _matches(file.name, exclude)]
    if not include and any(file.name.endswith(".safetensors") for file in chosen):
        chosen = [file for file in chosen if not _is_other(file.name)]
    if not chosen:
        names = ", ".join(sorted(file.name for file in files)[:8])
        raise UserError(f"no file is left by --include and --exclude; there are: {names}")
    return sorted(chosen, key=lambda file: (file.size > 64 << 20, file.name))


def _is_other(name: str) -> bool:
    return _matches(name, OTHER_WEIGHTS) and not _KEPT.search(name)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
