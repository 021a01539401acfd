"""Prodigy, Lion and schedule-free AdamW: trained, resumed to the bit, exported as they mean."""

import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from fastpo.config import OptimConfig, load_config
from fastpo.errors import ConfigError
from fastpo.train import train
from fastpo.train.consolidate import consolidate
from fastpo.train.optimizer import averaged, optimizer_bytes, setup_optimizer
from tests.conftest import raw_config, read_metrics
from tests.train.ending import EndAt

LIBRARIES = {"prodigy": "prodigyopt", "lion": "lion_pytorch", "schedule_free": "schedulefree"}
RATES = {"prodigy": 1.0, "lion": 1e-3, "schedule_free": 1e-2}
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def settings(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """`settings("run", "lion", ...)`: a small run with an optimizer."""
    base = tmp_path_factory.mktemp("optimizers")
    raw = raw_config("sd15", light_pipelines["sd15"], tiny_data, tiny_caches)
    path = base / "run.yaml"
    path.write_text(yaml.safe_dump(raw))

    def make(run, name, *overrides):
        optim = f"train.optim={{name: {name}, lr: {RATES[name]}, warmup_steps: 1}}"
        return load_config(path, [optim, f"train.output_dir={base / run}", *overrides])

    return make


def weights(folder):
    return load_file(folder / LORA)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_run_is_resumed_to_the_bit_and_measuring_changes_nothing(settings, name, tmp_path):
    pytest.importorskip(LIBRARIES[name])
    held = ("data.held_out=0.3", "train.max_steps=5", "train.checkpoint_every=2")
    whole = train(settings(name, name, *held), progress=False)
    broken = settings(f"{name}-broken", name, *held, "train.held_out_every=1")
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=False, observers=[EndAt(3)])
    train(broken, resume=True, progress=False)
    folder = broken.train.output_dir
    assert same(weights(folder / "final"), weights(whole / "final"))
    losses = [[m["loss"] for m in read_metrics(run)] for run in (folder, whole)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 2
    # what a checkpoint gives other programs is what the end of the run gives
    assert same(weights(consolidate(whole, tmp_path / "out")), weights(whole / "final"))


def quadratic(name, steps):
    """Minimizes `|w - 3|^2` from 1; returns the optimizer and the weight."""
    weight = nn.Parameter(torch.ones(8))
    config = OptimConfig(name=name, lr=RATES[name] if name != "lion" else 1e-2, weight_decay=0.0)
    optimizer = setup_optimizer([weight], config)
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - 3.0).square().sum().backward()
        optimizer.step()
    return optimizer, weight


def test_the_average_is_looked_at_and_the_weights_are_put_back():
    """Schedule-free: the average x is `(y - (1 - beta1) z) / beta1`, Defazio et al. 2024."""
    pytest.importorskip("schedulefree")
    optimizer, weight = quadratic("schedule_free", 20)
    y, z = weight.detach().clone(), optimizer.state[weight]["z"]
    with averaged(optimizer):
        torch.testing.assert_close(weight.detach(), (y - 0.1 * z) / 0.9)
        assert not torch.equal(weight, y)
    assert torch.equal(weight, y)
    optimizer.step()  # still in training mode


@pytest.mark.parametrize("name", ["lion", "prodigy"])
def test_their_steps_are_those_of_the_method(name):
    """Lion moves every weight by the rate; Prodigy's rate grows from 1e-6 by itself."""
    pytest.importorskip(LIBRARIES[name])
    optimizer, weight = quadratic(name, 3)
    if name == "lion":
        torch.testing.assert_close(weight.detach(), torch.full((8,), 1.03))
    else:
        assert optimizer.param_groups[0]["d"] > 2e-6
    before = weight.detach().clone()
    with averaged(optimizer):
        assert torch.equal(weight, before)  # they have no average


@pytest.mark.parametrize("name", LIBRARIES)
def test_states_are_counted_as_they_are(name):
    pytest.importorskip(LIBRARIES[name])
    optimizer, weight = quadratic(name, 2)
    held = sum(
        v.numel() * 4 for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.ndim
    )
    assert optimizer_bytes([weight], OptimConfig(name=name, lr=1.0)) == held


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_one_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    with pytest.raises(ConfigError, match=rf"{name} needs {LIBRARIES[name]}.*fastpo\[optim\]"):
        setup_optimizer([nn.Parameter(torch.zeros(2))], OptimConfig(name=name, lr=1.0))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("prodigy", "train.optim.lr=1e-5", r"train\.optim\.lr: prodigy finds the rate.*set 1\.0"),
        ("schedule_free", "train.optim.schedule=cosine", r"schedule_free averages.*constant"),
        ("schedule_free", "train.ema_decay=0.9", r"train\.ema_decay: schedule_free averages"),
        (
            "lion",
            "train.deepspeed=zero2",
            r"optim\.name: lion does not work with.*deepspeed",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, name, change, told):
    with pytest.raises(ConfigError, match=told):
        settings("-", name, change)
