"""Caches of their own for the tests of reference errors, which add to them."""

import shutil

import pytest

from fastpo.config import load_config
from fastpo.models.unet import UNetFamily


@pytest.fixture(scope="module")
def shared(tiny_caches, tmp_path_factory):
    """Copies of the prepared caches for the tests of this file, which add reference errors."""
    return shutil.copytree(tiny_caches, tmp_path_factory.mktemp("reference") / "caches")


@pytest.fixture(scope="module")
def single(tiny_caches, tmp_path_factory):
    """Copies in which only one set of reference errors is computed."""
    return shutil.copytree(tiny_caches, tmp_path_factory.mktemp("single") / "caches")


@pytest.fixture
def alone(tiny_caches, tmp_path):
    """The same for one test."""
    return shutil.copytree(tiny_caches, tmp_path / "caches")


@pytest.fixture
def settle(experiment):
    """`settle(caches, family, key=value, ...)`: the configuration over a copy of the caches."""

    def configuration(caches, family="sdxl", *, overrides=(), **options):
        path = experiment(family, **{"reference": "cached", **options})
        return load_config(path, [f"prepare.cache_dir={caches / family}", *overrides])

    return configuration


@pytest.fixture
def computed(monkeypatch):
    """Counts the pairs that the reference is run on, and the batches."""
    seen, predict = [], UNetFamily.predict

    def counting(family, model, noised, conditions):
        seen.append(len(noised.timesteps))
        return predict(family, model, noised, conditions)

    monkeypatch.setattr(UNetFamily, "predict", counting)
    return seen
