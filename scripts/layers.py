"""The layers of the tree, read from its imports: for the layer test and the picture in the docs.

python scripts/layers.py                 # draws docs/layers.png
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastpo"
# From top to bottom. Rooms of one layer do not import one another.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("study",),
    ("selftest",),
    ("demo", "testing"),
    ("plan",),
    ("train", "review"),
    ("reference_cache", "report", "pairs"),
    ("data", "noise", "evaluate"),
    ("models", "bench", "convert"),
    ("config", "loss"),
    ("system",),
    ("types", "precision", "errors", "ledger", "__init__"),
    ("_version",),
)


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Returns every module of a package by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yields the modules of the package that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
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


def room_of(module: str) -> str:
    """Returns the package or flat module below `fastpo` that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def layer_of(room: str) -> int:
    """Returns the number of a room's layer, 0 at the top.

    Raises:
        KeyError: The room is in no layer.
    """
    for number, rooms in enumerate(LAYERS):
        if room in rooms:
            return number
    raise KeyError(f"fastpo/{room} is in no layer: add it to LAYERS in scripts/layers.py")


def room_imports() -> dict[tuple[str, str], int]:
    """Returns how many imports lead from one room to another."""
    known = modules()
    counts: dict[tuple[str, str], int] = {}
    for module, path in known.items():
        for imported in imports(path, known):
            pair = room_of(module), room_of(imported)
            if pair[0] != pair[1] and "__init__" not in pair:
                counts[pair] = counts.get(pair, 0) + 1
    return counts


def draw(target: Path) -> None:
    """Draws the rooms in their layers, with an arrow for each import between rooms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = room_imports()
    present = {room for pair in counts for room in pair}
    rows = [[r for r in rooms if r in present] for rooms in LAYERS]
    rows = [row for row in rows if row]
    place = {
        room: ((k + 1) / (len(row) + 1), len(rows) - y)
        for y, row in enumerate(rows)
        for k, room in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(9, 9))
    for (upper, lower), count in sorted(counts.items()):
        (x0, y0), (x1, y1) = place[upper], place[lower]
        arrow = {
            "arrowstyle": "-|>",
            "color": "tab:red" if y1 >= y0 else "0.6",
            "lw": 0.4 + 0.25 * min(count, 8),
            "shrinkA": 14,
            "shrinkB": 14,
            "connectionstyle": "arc3,rad=0.08",
        }
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
    for room, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.45", "fc": "white", "ec": "0.2"}
        axes.text(x, y, room, ha="center", va="center", fontsize=11, bbox=box)
    axes.set_xlim(0, 1)
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.axis("off")
    axes.set_title("fastpo/: imports go down, never up (thickness: number of imports)")
    figure.tight_layout()
    figure.savefig(target, dpi=110, metadata={"Software": ""})
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs" / "layers.png")
    print(ROOT / "docs" / "layers.png")
