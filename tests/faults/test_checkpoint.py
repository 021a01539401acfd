"""A save that is ended anywhere leaves a whole checkpoint: the one before, or the new one."""

import shutil

import pytest
import torch
from torch import nn

from fastpo.config import parse_config
from fastpo.ledger import PairLedger
from fastpo.system.files import sweep
from fastpo.train.checkpoint import Origin, load_checkpoint, save_checkpoint
from fastpo.train.checkpoint_folders import Rotation, list_checkpoints
from fastpo.train.state import TrainingState
from fastpo.train.weights import PolicyWeights
from tests.faults.crash_points import FAULTS, end_everywhere


def make_state(value):
    """A state whose every tensor tells which one it is."""
    weight = nn.Parameter(torch.full((3,), float(value)))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.full((3,), float(value))
    optimizer.step()
    ledger = PairLedger(2)
    ledger.update(torch.tensor([0, 1]), torch.tensor([0.5, -0.5]) * value)
    return TrainingState(
        trainable={"weight": weight},
        weights=PolicyWeights({"weight": weight}, optimizer, main=True),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0),
        ledger=ledger,
        last_minority=torch.full((2,), float(value)),
        averages={},
    )


def origin_of(folder):
    """What these states are computed from: a configuration that trains nothing."""
    raw = {
        "model": {"path": "model"},
        "data": {"source": "folder", "path": "data"},
        "prepare": {"cache_dir": "cache"},
        "train": {"output_dir": str(folder), "objective": {"name": "sft"}, "max_steps": 9},
    }
    return Origin(parse_config(raw), "cache", 1)


def tensors(state):
    momentum = state.optimizer.state_dict()["state"][0]["exp_avg"]
    votes = state.ledger.state_dict().values()
    return [state.trainable["weight"].detach(), momentum, state.last_minority, *votes]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_is_whole_wherever_its_saving_ended(tmp_path, fault):
    origin = origin_of(tmp_path)
    states = {step: make_state(step) for step in (1, 2)}

    def save(folder, step):
        rotation = Rotation(folder, keep=1, main=True)
        rotation.begin(save_checkpoint(folder, step, states[step], origin))
        rotation.close()

    save(tmp_path / "before", 1)

    def act(number):
        save(tmp_path / str(number), 2)

    def check(number):
        checkpoints = tmp_path / str(number) / "checkpoints"
        sweep(checkpoints, sole_writer=True)
        newest = list_checkpoints(checkpoints.parent)[-1]
        loaded = make_state(9)
        step = load_checkpoint(newest, loaded, origin).step
        seen.add(step)
        pairs = zip(tensors(loaded), tensors(states[step]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        save(checkpoints.parent, 2)
        assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
        shutil.copytree(tmp_path / "before", tmp_path / str(number + 1))

    seen = set()
    shutil.copytree(tmp_path / "before", tmp_path / "0")
    steps = end_everywhere(act, check, lambda number: tmp_path / str(number), fault)
    assert steps >= 8
    assert seen == {1, 2}
