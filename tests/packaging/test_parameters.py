"""A function takes at most six parameters, so that a call reads without its definition."""

import ast

import pytest

from scripts.layers import PACKAGE, modules

MOST = 6
FREE = {
    "fastpo.cli.judging",  # one parameter per option of a command
    "fastpo.cli.training",
    "fastpo.cli.trying",
    "fastpo.loss.adaptive",  # a loss names each option of its formula
    "fastpo.loss.preference",
    "fastpo.loss.reference_free",
    "fastpo.data.loader.make_loader",  # public, all but two by name
    "fastpo.noise.pair_noise.make_noise",
    "fastpo.plan.planner.make_plan",
    "fastpo.plan.modes._attention",  # the signature of torch's scaled_dot_product_attention
}


@pytest.mark.parametrize(("module", "path"), modules(PACKAGE).items())
def test_functions_take_few_parameters(module, path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef) or {module, f"{module}.{node.name}"} & FREE:
            continue
        arguments = node.args
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        names = [a.arg for a in names if a.arg not in ("self", "cls")]
        assert len(names) <= MOST, f"{node.name} takes {len(names)}: {', '.join(names)}"
