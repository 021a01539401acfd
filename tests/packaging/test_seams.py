"""Tests and benchmarks watch the trainer through observers and its parts; none patches it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINER = "fastpo.train"


def trainer_names(tree):
    """Local names bound to `fastpo.train`, its modules or what they define."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name
                for alias in node.names
                if f"{alias.name}.".startswith(f"{TRAINER}.")
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                alias.asname or alias.name
                for alias in node.names
                if f"{node.module}.{alias.name}.".startswith(f"{TRAINER}.")
            }
    return names


def is_trainers(node, names):
    """Whether an expression is the trainer's, or an attribute of what is."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and f"{node.value}.".startswith(f"{TRAINER}.")
    text = f"{ast.unparse(node)}."
    return any(text.startswith(f"{name}.") for name in names)


def patches(source):
    """Lines that replace or delete something of the trainer."""
    tree = ast.parse(source)
    names, lines = trainer_names(tree), []
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            function = node.func.id if isinstance(node.func, ast.Name) else function
            if function in ("setattr", "delattr", "patch", "object"):
                targets = node.args[:1]
        elif isinstance(node, ast.Assign | ast.Delete):
            targets = [t for t in node.targets if isinstance(t, ast.Attribute)]
        lines += [node.lineno for target in targets if is_trainers(target, names)]
    return lines


@pytest.mark.parametrize(
    "source",
    [
        'monkeypatch.setattr("fastpo.train.loop.finish", None)',
        "import fastpo.train.loop as module\nmonkeypatch.setattr(module, 'finish', None)",
        "import fastpo.train.loop\nfastpo.train.loop.finish = None",
        "from fastpo.train.trainer import Trainer\nsetattr(Trainer, 'record', None)",
        "from fastpo.train import loop\npatch.object(loop.TimedIterator, 'close')",
        'mock.patch("fastpo.train.loop.finish")',
    ],
)
def test_every_way_of_patching_is_seen(source):
    assert patches(source)


def test_an_observer_is_no_patch():
    assert not patches(
        "from fastpo.train import train\nimport torch\n"
        "monkeypatch.setattr(torch.optim.AdamW, 'step', None)\n"
        "train(config, observers=[seen])\nself.trainer = train"
    )


def test_nothing_patches_the_trainer():
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(files) > 50
    found = {
        str(path.relative_to(ROOT)): lines for path in files if (lines := patches(path.read_text()))
    }
    assert found == {}
