"""What importing costs, and what depends on what; each in a fresh process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
def find_unless_blocked(name, path=None, target=None):
    return None if name.split(".")[0] in {names!r} else find(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_unless_blocked)
"""
HEAVY = ("diffusers", "transformers", "accelerate", "peft", "pydantic", "typer", "rich", "yaml")


def python(code, cwd="/"):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_needs_torch_only():
    print_loss = """
import torch, fastpo.loss
x = torch.zeros(2, 4)
print(float(fastpo.loss.dpo(x.requires_grad_(), x, x[:1], beta=1.0).loss))
"""
    out = python(BLOCK.format(names=("triton", *HEAVY)) + print_loss)
    assert float(out) == pytest.approx(0.6931472)


@pytest.mark.parametrize("module", ["fastpo", "fastpo.loss", "fastpo.ledger", "fastpo_kernels"])
def test_importing_touches_no_gpu_and_warns_of_nothing(module):
    code = f"import sys, warnings; warnings.simplefilter('error'); import {module}\n"
    code += "t = sys.modules.get('torch')\n"
    code += "print(bool(t and t.cuda.is_initialized()), 'triton' in sys.modules)"
    assert python(code).split()[0] == "False"


def test_the_kernels_never_import_fastpo():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "fastpo"], path


def test_kernels_from_the_root_is_not_ours():
    """`kernels` is another distribution's name; ours must not answer to it."""
    code = "import importlib.util as u; s = u.find_spec('kernels')\n"
    code += "print(s is None or s.loader is None or 'fastpo' not in str(s.origin))"
    assert python(code, cwd=ROOT).strip() == "True"


def test_the_command_line_says_what_to_install():
    code = BLOCK.format(names=("typer",)) + "import fastpo.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
