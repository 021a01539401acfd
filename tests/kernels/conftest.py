"""Where the kernels run, poisoned memory and small tiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.interpreter import replace_language_once

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    """Of the tests that `test_operators.py` repeats, those of the CPU's implementation."""

    def repeated(item):
        return item.path.name == "test_operators.py"

    def of_the_cpu(item):
        return "callspec" in vars(item) and item.callspec.params.get("impl") == "cpu"

    items[:] = [item for item in items if not repeated(item) or of_the_cpu(item)]


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Where kernels are interpreted, in little more than half of the time."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        replace_language_once()


@pytest.fixture(scope="session")
def device():
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def nan_poisoned(monkeypatch):
    """Every `torch.empty` and `empty_like` comes back full of NaN."""

    def poisoned(allocate):
        def fill(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return fill

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture
def small_tiles():
    """Tiles of 64, three programs a pair: several tiles a program, several programs a row."""
    from fastpo_kernels.pair_loss.gpu import launch

    with launch.launches_as(launch.LaunchConfig(64, 3, 4)):
        yield


@pytest.fixture(scope="session")
def run_compiling():
    """Runs a script where Triton compiles: in a process without the interpreter's variable."""

    def run(*words):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        folders = (ROOT, ROOT / "kernels", ROOT / "benchmarks")
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
