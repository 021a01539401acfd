"""Imports go down the layers of `docs/architecture.md`, never up, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastpo"
# From top to bottom. What stands on one line may not import one another.
LAYERS = [
    {"__main__"},
    {"cli", "study"},
    {"demo", "testing"},
    {"plan"},
    {"train"},
    {"reference_cache", "report"},
    {"data", "noise", "evaluate"},
    {"models", "bench"},
    {"config", "loss"},
    {"system"},
    {"types", "precision", "errors", "ledger", "__init__"},
    {"_version"},
]
# `python -m fastpo.train` is the one entry that launchers start; it hands on to the command line.
CLIMBS = {
    ("fastpo.train.__main__", "fastpo.cli"),
}
TYPES_ALONE = {
    ("fastpo.models.registry", "fastpo.models.family"),
    ("fastpo.models.folder", "fastpo.models.family"),
    ("fastpo.models.export", "fastpo.models.family"),
}


def modules(folder=PACKAGE, root=ROOT):
    """Every module of a package by its dotted name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path, known, *, top_only=False):
    """The modules of the package that a file imports, at its top or inside a function."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


def layer_of(module):
    room = [*module.split("."), "__init__"][1]
    for number, rooms in enumerate(LAYERS):
        if room in rooms:
            return number, room
    pytest.fail(f"{module}: the room {room!r} is in no layer; add it to LAYERS and the docs")


def test_imports_go_down_the_layers():
    known = modules()
    climbs = set()
    for module, path in known.items():
        mine, room = layer_of(module)
        for imported in imports(path, known):
            if imported == "fastpo":
                continue
            other, other_room = layer_of(imported)
            if other < mine or (other == mine and other_room != room):
                climbs.add((module, imported))
    assert climbs <= CLIMBS, sorted(climbs - CLIMBS)
    assert climbs == CLIMBS, "an exception that nothing needs any more"


def test_no_circle_of_imports():
    """Not even through imports inside functions."""
    known = modules()
    graph = {
        module: set(imports(path, known)) - {module, "fastpo"} for module, path in known.items()
    }
    for module in graph:  # a package that hands on names is no circle with its own modules
        if known[module].name == "__init__.py":
            graph[module] = set()
    graph["fastpo.train.__main__"] = set()
    for module, typed in TYPES_ALONE:
        graph[module] -= {typed}
    tuple(TopologicalSorter(graph).static_order())


def test_few_modules_lie_flat():
    flat = [p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("__")]
    assert len(flat) <= 8, flat
