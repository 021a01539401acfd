"""What the kernels' modules may import, and how their functions look."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "kernels" / "fastpo_kernels"
PATHS = sorted(ROOT.rglob("*.py"))
MOST_PARAMETERS, MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 6, 400, 60
# What a module of the key's folder must not import; paths below fastpo_kernels, dotted.
FORBIDDEN = {
    "_shared": ("pair_loss", "pair_noise"),
    "pair_noise": ("pair_loss",),
    "pair_loss.gpu": (
        "pair_loss.api",
        "pair_loss.fused",
        "pair_loss.ops",
        "pair_loss.cpu",
        "pair_loss.reference",
        "pair_loss.epilogue",
        "pair_loss.objectives",
    ),
    "pair_loss.cpu": ("pair_loss.reference", "pair_loss.gpu"),
    "pair_loss.native": (
        "pair_loss.api",
        "pair_loss.cpu",
        "pair_loss.fused",
        "pair_loss.gpu",
        "pair_loss.reference",
        "pair_loss.epilogue",
    ),
    "pair_loss.reference": ("pair_loss.cpu", "pair_loss.gpu", "pair_loss.native"),
    "pair_loss.epilogue": ("pair_loss.reference", "pair_loss.cpu", "pair_loss.gpu"),
    "pair_loss.objectives": ("pair_loss.reference", "pair_loss.cpu", "pair_loss.gpu"),
    "pair_noise.reference": ("pair_noise.kernel", "pair_noise.ops"),
    "pair_noise.kernel": ("pair_noise.reference", "pair_noise.ops"),
}


def module_of(path):
    """Dotted, below fastpo_kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, *, lazy=True):
    """Modules below fastpo_kernels that a file imports; `lazy` with those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastpo_kernels"):
            module = node.module.removeprefix("fastpo_kernels").removeprefix(".")
            found.add(module)
            # `from package import module` imports the module.
            names = (".".join(filter(None, (module, alias.name))) for alias in node.names)
            found |= {name for name in names if name in MODULES}
    return found - {""}


MODULES = {module_of(path) for path in PATHS}


def below(module, folder):
    return module == folder or module.startswith(folder + ".")


@pytest.mark.parametrize("path", PATHS, ids=module_of)
def test_imports_go_one_way(path):
    for folder, forbidden in FORBIDDEN.items():
        if below(module_of(path), folder):
            wrong = [m for m in imports(path) for f in forbidden if below(m, f)]
            assert not wrong, f"{module_of(path)} imports {wrong}"


def test_there_is_no_circle():
    """Of packages, what their `__init__` hands on counts as theirs."""
    graph = {module_of(p): imports(p) for p in PATHS if p.name != "__init__.py"}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_, module])
        if module in done or module not in graph:
            return
        open_.append(module)
        for other in graph[module]:
            visit(other)
        done.add(open_.pop())

    for module in graph:
        visit(module)


def functions(path):
    """Functions, and whether each is a kernel or an operator's schema."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            told = " ".join(ast.unparse(d) for d in node.decorator_list)
            yield node, any(word in told for word in ("triton.jit", "custom_op", "register_fake"))


def public(path):
    """Names that the package hands on."""
    text = (path.parent / "__init__.py").read_text()
    names = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assign)]
    return {e.value for n in names for e in getattr(n.value, "elts", ())}


@pytest.mark.parametrize("path", PATHS, ids=module_of)
def test_functions_and_files_are_short_and_take_few_parameters(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES_OF_A_FILE
    assert "fmt: skip" not in path.read_text()
    for function, is_flat in functions(path):
        given = function.args
        n = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
        # The factories of `testing.py` are public to tests and benchmarks.
        free = is_flat or path.name == "testing.py" or function.name in public(path)
        assert free or n <= MOST_PARAMETERS, f"{function.name} takes {n} parameters"
        docstring = ast.get_docstring(function, clean=False) or ""
        lines = function.end_lineno - function.lineno - len(docstring.splitlines())
        assert is_flat or lines <= MOST_LINES_OF_A_FUNCTION, f"{function.name} has {lines} lines"


def test_every_objective_has_its_twin_in_cpp():
    """In the order of the enumeration; one that is left out there runs on torch's operators."""
    from fastpo_kernels.pair_loss import OBJECTIVES
    from fastpo_kernels.pair_loss.native import launch

    text = (ROOT / "pair_loss" / "native" / "objectives.h").read_text()
    found = re.search(r"enum class Objective : int64_t {\s(.*)\s};", text)
    assert found and found[1].strip().split(", ") == list(launch._OBJECTIVE)
    assert launch.OBJECTIVES <= OBJECTIVES.keys()


def test_every_objective_has_its_twin_in_triton():
    from fastpo_kernels.pair_loss import OBJECTIVES
    from fastpo_kernels.pair_loss.gpu import objectives

    assert objectives.OBJECTIVES.keys() == OBJECTIVES.keys()
    for name, function in objectives.OBJECTIVES.items():
        assert function.fn.__name__ == name
