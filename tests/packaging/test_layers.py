"""Imports go down the layers of `docs/architecture.md`, never up, and never in a circle."""

import runpy
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastpo"
# The layers, and how imports are read, are those of the picture in the docs.
tree = runpy.run_path(str(ROOT / "scripts" / "layers.py"))
modules, imports = tree["modules"], tree["imports"]
# `python -m fastpo.train` is the one entry that launchers start; it hands on to the command line.
CLIMBS = {
    ("fastpo.train.__main__", "fastpo.cli"),
}
TYPES_ALONE = {
    ("fastpo.models.registry", "fastpo.models.family"),
    ("fastpo.models.folder", "fastpo.models.family"),
    ("fastpo.models.export", "fastpo.models.family"),
}


def layer_of(module):
    room = tree["room_of"](module)
    return tree["layer_of"](room), room


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
