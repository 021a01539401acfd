"""Whole steps of transformers: the recipe beside ours, on a model of one layer."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastpo.models.registry import load_family
from fastpo.types import NoisedPair

ROOT = Path(__file__).parents[2]
OURS, RECIPE = "FastPO DPO, cached reference", "recipe Flow-Factory DPO"


@pytest.fixture(params=["sd3", "flux"])
def size(request, monkeypatch):
    """A size of one layer, known to the scripts as `one-layer`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    models = import_module("step_models")
    width = {"sd3": 8, "flux": 16}[request.param]
    size = models.Size(request.param, latent=4, width=width, depth=64)
    monkeypatch.setitem(models.SIZES, "one-layer", size)
    return size


def test_the_recipe_calls_a_transformer_as_the_family_does(size):
    models, flow = import_module("step_models"), import_module("step_flow")
    torch.manual_seed(0)
    model = models.build_denoiser(size).eval()
    batch = models.make_inputs(size, 2, torch.device("cpu")).batch
    family, sigma = load_family(size.family), torch.tensor([0.3, 0.8])
    noisy = batch.latent_mean.float()
    with torch.no_grad():
        noised = NoisedPair(noisy, sigma, family.told(sigma), noisy)
        together = family.predict(model, noised, batch.conditions).chunk(2)
        for arm, expected in zip(noisy.chunk(2), together, strict=True):
            found = flow.predict_arm(model, size.family, arm, sigma, batch.conditions)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert together[0].std() > 1e-3


def test_each_step_runs_and_only_the_recipe_encodes_and_has_a_reference(size):
    bench = import_module("bench_step")
    case = bench.Case("one-layer", "lora", 1, "fp32", False)
    names = bench.FLOOR, OURS, RECIPE
    assert bench.groups("lora", bench.providers_of("one-layer"), flow=True)[0][-1] == RECIPE
    steps = bench.Bench(case, names)
    parts = {name: bench.parts_of(steps, name, 1) for name in names}
    for name, found in parts.items():
        assert found["policy forward"] > 0 < found["backward"]
        assert ("VAE" in found) == ("reference" in found) == (name == RECIPE)
    weights = {name: p.detach().clone() for name, p in steps.denoisers.trainable.items()}
    steps.steps[RECIPE]()
    assert any(not torch.equal(weights[n], p) for n, p in steps.denoisers.trainable.items())


def test_a_transformers_marks_stand_beside_its_own_recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plot = import_module("plot_step")
    case = dict(zip(plot.CASE, ("sd3-mid", "lora", "1", "fp32", "False"), strict=True))
    rows = [
        case | {"provider": OURS, "times_floor": "1.01", "faster_than_recipe": "1.7"},
        case | {"provider": RECIPE, "times_floor": "1.7", "faster_than_recipe": ""},
    ]
    for row, peak in zip(rows, ("700", "900"), strict=True):
        row["peak_mib"] = peak
    cells = plot.marks_table(rows).splitlines()[2].split(" | ")[2:]
    assert cells == [
        "1.01, met (at most 1.05)",
        "1.7x, met (at least 1.5x)",
        "700, not met (below 0.75 x 900) |",
    ]
