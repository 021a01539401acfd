"""What the shipped configurations are planned to cost, and what is said of it."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from fastpo.config import load_config
from fastpo.plan import make_plan
from fastpo.plan.planner import measure

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "fastpo" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_packaged_configuration_plans_on_a_tiny_model(path, tiny_pipelines):
    family = "sd15" if "sd15" in path.stem else "sdxl"
    small = (f"model.path={tiny_pipelines[family]}", "prepare.resolution=32", "model.vae=null")
    plan = make_plan(load_config(path, small), world_size=8)
    assert plan.costs[0].fits
    assert plan.costs[0].flops.vae == 0


@pytest.fixture(scope="module")
def measured_once():
    """Configurations whose modules and passes are alike share one measurement."""
    known = {}

    def measure_once(architecture, config, shapes, status):
        train = config.train
        passes = (train.method, train.precision, train.gradient_checkpointing, train.weights)
        key = repr((architecture, passes, train.lora, train.optim.name, shapes))
        if key not in known:
            known[key] = measure(architecture, config, shapes, status)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpo.plan.planner.measure", measure_once)
        yield


PLANS = runpy.run_path(str(ROOT / "scripts" / "update_plans.py"))
COMMAND = re.compile(r"fastpo plan +(\S+)\.yaml --gpu (\S+)(?: --world-size (\d+))?")
FORWARD, VAE = {"sdxl": 13.5, "sd15": 1.6}, {"sdxl": 9.8, "sd15": 2.2}  # TFLOP of a pair
GIGABYTES = {"rtx4090": 24, "a100": 80, "h100": 80}


def test_every_shipped_configuration_for_a_real_model_has_its_row():
    real = [p.stem for p in CONFIGS if "/" in yaml.safe_load(p.read_text())["model"]["path"]]
    assert sorted(name for name, *_ in PLANS["ROWS"]) == real


@pytest.mark.slow
@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize(("name", "gpu", "processes"), PLANS["ROWS"], ids=lambda x: str(x))
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
    both = (2.0, 1e-2) if plan.method == "full" else (1.1, 5e-2)
    assert backward / forward == pytest.approx(both[0], rel=both[1])
    assert released[0].flops.reference == pytest.approx(FORWARD[plan.family], rel=0.02)
    assert released[0].flops.vae == pytest.approx(VAE[plan.family], rel=0.02)
    own = {"mapo": 1, "adaptive_dpo": 2}.get(plan.objective, 0)  # the recipe of the same objective
    assert released[own].slower > 1.25 and released[own].peak_bytes > ours.peak_bytes
    text = path.read_text()
    assert COMMAND.search(text).groups() == (name, gpu, None if processes == 1 else str(processes))
    assert PLANS["header"](plan) in text.splitlines()
    assert PLANS["line"](name, plan) in (ROOT / "README.md").read_text().splitlines()
