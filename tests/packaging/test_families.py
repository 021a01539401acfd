"""Which family a model is of, `models/` and `plan/` know; everything else asks the family."""

import ast
from pathlib import Path

import pytest

from fastpo.models.registry import FAMILIES, load_family

PACKAGE = Path(__file__).parents[2] / "fastpo"
KNOWING = ("models/", "plan/")
# These make a model of one kind from nothing; they are given none of which they could ask.
MAKERS = (
    "demo/base.py",
    "demo/base_training.py",
    "demo/flow_base.py",
    "study/emoji/base.py",
    "testing/datasets.py",
    "testing/flow.py",
    "testing/language_pipelines.py",
    "testing/pipelines.py",
    "testing/single_files.py",
)
SIZES = "bench/"  # its `sdxl` and `sd15` are sizes of latents; it loads no model
OPTIONS = "convert/"  # its `sdxl` is an option of another trainer; it loads no model
CLASSES = ("UNet2D", "StableDiffusion", "Transformer2DModel", "Transformer3DModel")


def questions(tree):
    """Yields `(line, what)` for each place of a module that knows a family."""
    families = [load_family(name) for name in FAMILIES]
    modules = {place.partition(":")[0] for place in FAMILIES.values()}
    parts = {part for f in families for part in (f.denoiser, "transformer", *f.encoder_parts)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = node.module if isinstance(node, ast.ImportFrom) else None
            imported = {*names, *(f"{module}.{name}" for name in names), module}
            if imported & modules or any(c in name for c in CLASSES for name in names):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in parts | set(FAMILIES) | {f"{part}/" for part in parts}:
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Compare | ast.Match) and "family" in ast.unparse(node):
            yield node.lineno, ast.unparse(node)


def test_nothing_outside_models_and_plan_asks_for_the_family():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith((*KNOWING, SIZES, OPTIONS)) or name in MAKERS:
            continue
        found += [(name, *question) for question in questions(ast.parse(path.read_text()))]
    assert found == []


def test_the_benchmarks_of_losses_load_no_model():
    for path in (*(PACKAGE / SIZES).glob("*.py"), *(PACKAGE / OPTIONS).glob("*.py")):
        assert "fastpo.models" not in path.read_text(), path


@pytest.mark.parametrize(
    "code",
    [
        "if model.family.name == 'other': pass",
        "match family:\n    case _: pass",
        "from diffusers import UNet2DConditionModel",
        "from fastpo.models.unet import predict",
        "import fastpo.models.unet",
        "path = folder / 'unet'",
        "part = 'text_encoder_2'",
        "names = {'sdxl': 1}",
    ],
)
def test_a_question_is_found(code):
    assert list(questions(ast.parse(code)))


def test_asking_the_family_is_no_question():
    code = "latents = model.family.predict(denoiser, noised, conditions)\nname = family.name"
    assert list(questions(ast.parse(code))) == []
