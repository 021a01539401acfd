"""What the shipped configurations are planned to cost, and what is said of it."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from fastpo.config import load_config
from fastpo.plan import make_plan
from fastpo.plan.planner import measure
from tests.tiny_twins import tiny_twin

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "fastpo" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_packaged_configuration_plans_on_a_tiny_model(path, tiny_pipelines, tmp_path):
    changes = tiny_twin(load_config(path), tiny_pipelines, tmp_path / "model")
    small = [f"{key}={value}" for key, value in changes.items()]
    plan = make_plan(load_config(path, (*small, "prepare.resolution=32")), world_size=8)
    assert plan.costs[0].fits
    assert plan.costs[0].flops.vae == 0


@pytest.fixture(scope="module")
def measured_once():
    """Configurations whose modules and passes are alike share one measurement."""
    known = {}

    def measure_once(architecture, config, shapes, status):
        train = config.train
        passes = (train.method, train.precision, train.gradient_checkpointing, train.weights)
        passes += (train.quantize_base,)
        key = repr((architecture, passes, train.lora, train.optim.name, shapes))
        if key not in known:
            known[key] = measure(architecture, config, shapes, status)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpo.plan.planner.measure", measure_once)
        yield


PLANS = runpy.run_path(str(ROOT / "scripts" / "update_plans.py"))
COMMAND = re.compile(r"fastpo plan +(\S+)\.yaml --gpu (\S+)(?: --world-size (\d+))?")
# TFLOP of a pair. A transformer's forward pass is about two operations for each weight, token of
# image and text, and side, beside attention.
FORWARD = {
    "sdxl": 13.5,
    "sd15": 1.6,
    "z-image": 125.6,
    "flux2-klein": 69.8,
    "flux": 149.4,
    "qwen-image": 178.7,
    "sd3": 22.4,
}
VAE = {"sdxl": 9.8, "sd15": 2.2, "qwen-image": 14.8}
GIGABYTES = {"rtx4090": 24, "a100": 80, "h100": 80}


def test_every_shipped_configuration_for_a_real_model_has_its_row():
    real = [p.stem for p in CONFIGS if "/" in yaml.safe_load(p.read_text())["model"]["path"]]
    assert sorted(name for name, *_ in PLANS["ROWS"]) == real


LIKE_OTHERS = ("sdxl-full-80gb", "diffusion-dpo-published")
"""Rows of a model, method and objective that other rows have in other batches."""


@pytest.mark.slow
@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize(
    ("name", "gpu", "processes"),
    [
        pytest.param(*row, marks=[pytest.mark.long] if row[0] in LIKE_OTHERS else [])
        for row in PLANS["ROWS"]
    ],
    ids=str,
)
def test_a_shipped_configuration_costs_what_its_header_and_the_readme_say(name, gpu, processes):
    path = ROOT / "fastpo" / "configs" / f"{name}.yaml"
    plan = make_plan(load_config(path), gpu=gpu, world_size=processes)
    ours, _, *released = plan.costs
    assert "packaged" in plan.architecture
    assert ours.fits and ours.peak_bytes < GIGABYTES[gpu] * 1e9
    for cost in plan.costs:
        assert sum(cost.memory.parts.values()) == cost.memory.total == cost.peak_bytes
        assert sum(cost.flops.model_dump().values()) == pytest.approx(cost.tflop)
    forward, backward = ours.flops.policy_forward, ours.flops.policy_backward
    assert forward == pytest.approx(FORWARD[plan.family], rel=0.02)
    # Frozen weights need no gradient: half of the backward pass, but for the adapters'.
    # A transformer's is longer by attention, whose backward pass takes 2.5 times the forward one.
    adapters = (1.1, 5e-2) if plan.family in ("sdxl", "sd15") else (1.19, 5e-2)
    both = (2.0, 1e-2) if plan.method == "full" else adapters
    assert backward / forward == pytest.approx(both[0], rel=both[1])
    assert released[0].flops.reference == pytest.approx(FORWARD[plan.family], rel=0.02)
    assert released[0].flops.vae == pytest.approx(VAE.get(plan.family, 9.77), rel=0.02)
    # The recipe of the same objective; of flow-matching models there is one.
    own = {"mapo": 1, "adaptive_dpo": 2}.get(plan.objective, 0) if len(released) > 1 else 0
    assert released[own].slower > 1.25 and released[own].peak_bytes > ours.peak_bytes
    text = path.read_text()
    assert COMMAND.search(text).groups() == (name, gpu, None if processes == 1 else str(processes))
    assert PLANS["header"](plan) in text.splitlines()
    assert PLANS["line"](name, plan) in (ROOT / "README.md").read_text().splitlines()
