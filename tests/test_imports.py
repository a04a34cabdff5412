"""Imports point down: each file's imports are compared with the list of layers below.

A room is a folder of src/millrace/ without its sub-folders, or a file beside them. Rooms of one
line do not import each other; a room imports rooms of earlier lines only, so that no circle of
packages is possible. Imports within functions and under TYPE_CHECKING count like all others.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "millrace"

# From low to high. "millrace" is the package's own __init__.py.
LAYERS = [
    # what every part may use
    "version errors",
    "vllm_keywords speculation",
    "target",
    "protocol config lengths response_ids common tasks request_parser model_lookup vllm_flags",
    "hardware logs dashboard",
    "batch",
    "batch.jobs",
    # the engine plane: one replica
    "text.tools text.checkpoint text.chat kernels engine.cache",
    "engine",
    "text kernels.cpu kernels.gpu model",
    "model.w4",
    "model.formats model.work",
    "model.layers",
    "model.drafters",
    "model.families",
    "kernels.gpu.attention kernels.gpu.gdn kernels.gpu.gemm",
    "kernels.gpu.moe",
    "runtime.ranks",
    "runtime.step runtime.transfer",
    "runtime.tiers",
    "runtime",
    "runtime.kernel_tuning",
    "replica",
    "llm server.telemetry",
    "server.engine_link",
    "server.http server.sandbox",
    "server.api",
    "server.api.chat server.api.completions",
    "server.api.anthropic server.api.batches server.api.openai_responses server.api.tokenize",
    # the fleet plane: many replicas, known by HTTP alone
    "gateway.common",
    "gateway.http",
    "gateway.routing gateway.resume",
    "gateway.relay gateway.health",
    "gateway.admin",
    "gateway.processes",
    "gateway",
    "observe.samples",
    "observe.report",
    "observe",
    "fleet bench.flags",
    "bench.workload",
    "bench.load",
    "bench.measure",
    "bench.report",
    "bench.runs",
    "bench",
    # what a fleet will do: reads models' descriptions, and measures nothing
    "plan.facts",
    "plan.model",
    "plan.predict",
    "plan.calibration",
    "plan",
    # tries what the planner proposes, on servers that it knows by HTTP
    "tune.space",
    "tune.trials",
    "tune.search",
    "tune.servers",
    "tune",
    # commands that use both planes
    "simulate.common",
    "simulate.events simulate.aggregated",
    "chat eval server doctor simulate download quantize",
    "deploy.layout",
    "deploy.manifests",
    "deploy.files",
    "deploy.check",
    "deploy",
    "about offline",
    "report.steps",
    "report.sections",
    "report",
    "cli millrace",
    "__main__",
]

FLEET_PLANE = {"gateway", "fleet", "bench", "tune", "observe", "batch"}
# What the fleet plane may use besides itself; so it reaches no engine, whatever these import.
FLEET_GROUND = {
    "version", "errors", "target", "response_ids", "common", "tasks", "request_parser", "hardware",
    "logs", "dashboard",
}  # fmt: skip
# The tuner asks the planner for its first settings; that knows models by their descriptions alone.
# And it looks for such a description itself.
PLANNER_OF_TUNER = {
    ("tune", name) for name in ("plan", "plan.predict", "plan.facts", "plan.model", "model_lookup")
}

# Which top-level rooms may import these packages; no other room does, not in a function either.
OWNERS = {
    "torch": {"kernels", "model", "runtime", "replica", "doctor", "quantize", "report"},
    "triton": {"kernels", "runtime"},
    "transformers": {"report"},
    "zmq": {"replica", "server"},
    "tokenizers": {"text", "model", "bench"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "ray": {"offline"},
}
MAX_MODULES = 16


def files() -> dict[str, Path]:
    """Module -> its file."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = ("millrace", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = files()


def room(module: str) -> str:
    """The room that a module belongs to, without the leading "millrace."."""
    is_package = FILES[module].name == "__init__.py"
    place = module if is_package or module.count(".") == 1 else module.rpartition(".")[0]
    return place.removeprefix("millrace.")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """What a file imports, as whole names: modules, or the names of a module."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; give the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@functools.cache
def own_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    names = {name for name in imports(path) if name.split(".")[0] == "millrace"}
    return {name if name in FILES else name.rpartition(".")[0] for name in names}


LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}


def test_every_room_has_a_layer_and_only_one() -> None:
    names = [name for line in LAYERS for name in line.split()]
    assert sorted(names) == sorted({room(module) for module in FILES})


def test_imports_point_down() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, path in FILES.items()
        for other in own_modules(path)
        if room(other) != room(module) and LEVEL[room(other)] >= LEVEL[room(module)]
    }
    assert wrong == set()


def test_the_fleet_plane_knows_a_replica_by_http_alone() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, path in FILES.items()
        if room(module).partition(".")[0] in FLEET_PLANE
        for other in own_modules(path)
        if room(other).partition(".")[0] not in FLEET_PLANE | FLEET_GROUND
        and (room(module), room(other)) not in PLANNER_OF_TUNER
    }
    assert wrong == set()


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_a_heavy_package_stays_in_its_rooms(package: str) -> None:
    users = {
        module
        for module, path in FILES.items()
        if package in {name.split(".")[0] for name in imports(path)}
    }
    wrong = {module for module in users if room(module).split(".")[0] not in OWNERS[package]}
    assert wrong == set()


@pytest.mark.parametrize("top", ["src", "tests"])
def test_folders_are_small(top: str) -> None:
    folders = [path.parent for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py"]
    counts = {str(folder.relative_to(ROOT)): folders.count(folder) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MAX_MODULES} == {}


# --- private names -----------------------------------------------------------------------------

PRIVATE = re.compile(r"_[a-zA-Z]\w*$")
PATCHES = {"setattr", "delattr", "getattr", "set_attribute"}
FEW = 10  # uses that are worth less than another interface


def defined(tree: ast.Module) -> Iterator[str]:
    """Private names that a file defines: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of what a file reads or replaces on other objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if getattr(node.value, "id", "") != "os":  # os._exit is the library's
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            constants = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            if name in PATCHES:
                yield from ((node.lineno, text) for text in constants if isinstance(text, str))


def test_tests_use_public_names() -> None:
    """A test that needs a private name asks for a narrow interface instead."""
    source = [parsed(path) for path in FILES.values()]
    private = {name for tree in source for name in defined(tree) if PRIVATE.match(name)}
    trees = {path: parsed(path) for path in sorted((ROOT / "tests").rglob("*.py"))}
    private -= {name for tree in trees.values() for name in defined(tree)}
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in trees.items()
        for line, name in used(tree)
        if name in private
    ]
    assert len(found) <= FEW, "\n".join(found)
