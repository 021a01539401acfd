"""Where the kernels run, poisoned memory and small tiles."""

import pytest
import torch


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
    from fastpo_kernels.pair_loss import launch

    with launch.launches_as(launch.LaunchConfig(64, 3, 4)):
        yield
