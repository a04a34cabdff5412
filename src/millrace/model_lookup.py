"""Where models are: a directory that the user names, one of the models that ship, or one that
Hugging Face's tools have downloaded.

It looks at directories only; what lies in them is read elsewhere, and nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from millrace.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def find_model(name: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory of a model: `name` itself, a shipped model, or an id in the cache.

    revision: branch, tag or commit of a model in the cache of Hugging Face (default: main).
    download_dir: that cache (default: where its tools keep it). Raises CheckpointError that says
    what there is, or the command that gets the model.
    """
    direct = Path(name).expanduser()
    if direct.is_dir():
        if not (direct / "config.json").is_file():
            raise CheckpointError(f"{direct}: no config.json there; a model directory has one")
        return direct.resolve()
    found = shipped_models()
    if name in found:
        return found[name]
    if _HUB_ID.fullmatch(name):
        return _in_cache(name, revision, download_dir)
    plain, _, suffix = name.partition("@")
    if suffix and _HUB_ID.fullmatch(plain):
        raise CheckpointError(
            f"model {name!r}: a revision is an option of its own here: {plain} --revision {suffix}"
        )
    there = f"these ship: {', '.join(sorted(found))}" if found else "none ships with this install"
    raise CheckpointError(f"model {name!r}: neither a directory nor a shipped model ({there})")


def shipped_models() -> dict[str, Path]:
    """name -> directory of every model that can be named; where two have one name, the first."""
    found: dict[str, Path] = {}
    for place in _places():
        if place.is_dir():
            for config in sorted(place.glob("*/config.json")):
                found.setdefault(config.parent.name, config.parent)
    return found


def _places() -> Iterator[Path]:
    """$MILLRACE_MODELS (as PATH is written), the installed package's models, and `models/` of the
    checkout this runs from."""
    for place in os.environ.get("MILLRACE_MODELS", "").split(os.pathsep):
        if place:
            yield Path(place).expanduser().resolve()
    package = Path(__file__).resolve().parent
    yield package / "shipped_models"
    if (package.parents[1] / "pyproject.toml").is_file():
        yield package.parents[1] / "models"


# --- the cache of Hugging Face -----------------------------------------------------------------


def hub_cache() -> Path:
    """Where Hugging Face's tools keep models: HF_HUB_CACHE, or `hub` in HF_HOME."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if place := os.environ.get(variable):
            return _expanded(place)
    if home := os.environ.get("HF_HOME"):
        return _expanded(home) / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (_expanded(base) if base else Path.home() / ".cache") / "huggingface" / "hub"


def _expanded(place: str) -> Path:
    return Path(os.path.expandvars(place)).expanduser()


def _in_cache(name: str, revision: str | None, download_dir: str | None) -> Path:
    cache = _expanded(download_dir) if download_dir else hub_cache()
    model = cache / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    snapshot = _snapshot(model, wanted)
    if snapshot is not None and (snapshot / "config.json").is_file():
        return snapshot.resolve()
    words = ["millrace", "download", name]
    words += ["--revision", revision] if revision else []
    words += ["--cache-dir", download_dir] if download_dir else []
    known = _revisions(model)
    state = f"no revision {wanted!r}" if known else "not there"
    if snapshot is not None:
        state = f"revision {wanted!r} without a config.json"
    others = f" (there: {', '.join(known)})" if known and snapshot is None else ""
    raise CheckpointError(
        f"model {name!r}: no such directory, and {state} in the Hugging Face cache {cache}"
        f"{others}; get it with: {shlex.join(words)}"
    )


def _snapshot(model: Path, revision: str) -> Path | None:
    """The files of a revision: a commit, or a branch or tag whose file in `refs` names one."""
    if _COMMIT.fullmatch(revision):
        commit = revision
    else:
        reference = model / "refs" / revision
        if ".." in Path(revision).parts or not reference.is_file():
            return None
        commit = reference.read_text(encoding="utf-8").strip()
    found = model / "snapshots" / commit
    return found if commit and found.is_dir() else None


def _revisions(model: Path) -> list[str]:
    """The branches and tags of a model in the cache; where there are none, its commits."""
    references = model / "refs"
    named = [str(path.relative_to(references)) for path in references.rglob("*") if path.is_file()]
    return sorted(named or [path.name for path in (model / "snapshots").glob("*")])
