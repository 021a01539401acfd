"""Co-teaching: the rule by which pairs are picked, for whom, and what is left without it."""

import pytest
import torch
from safetensors.torch import load_file

from fastpo.config import load_config
from fastpo.study import co_teaching
from fastpo.study.co_teaching import Pupil, small_losses
from fastpo.study.own_steps import train_with
from fastpo.train import train

TRAINED = {"max_steps": 3, "checkpoint_every": 9, "micro_batch_size": 4}


def weights(run):
    return load_file(run / "final" / "pytorch_lora_weights.safetensors")


def test_the_largest_margins_are_the_small_losses():
    """Three of five: margins 3, 2 and the first of two equal ones; each counts 5/3."""
    margin = torch.tensor([1.0, -2.0, 3.0, 1.0, 2.0])
    assert small_losses(margin, 0.7).tolist() == pytest.approx([5 / 3, 0, 5 / 3, 0, 5 / 3])
    assert small_losses(margin, 1.0).tolist() == [1.0] * 5
    assert small_losses(margin, 0.1).tolist() == [0.0, 0.0, 5.0, 0.0, 0.0], "one at least"


@pytest.fixture
def heard(monkeypatch):
    """Every batch that a model learns from: whose it was, its margins, and what was picked."""
    learned, plain = [], Pupil.learn

    def learn(pupil, batch, picked):
        learned.append((pupil, batch.margin.clone(), picked.clone()))
        plain(pupil, batch, picked)

    monkeypatch.setattr(Pupil, "learn", learn)
    return learned


def test_each_model_learns_from_what_the_other_one_picks(experiment, monkeypatch, heard):
    monkeypatch.setattr(co_teaching, "GRADUAL", 1e-9)
    config = load_config(experiment(data={"flip_rate": 0.4}, **TRAINED))
    run = co_teaching.co_teaching(config)
    assert (run / "final").is_dir() and (run / "minority.csv").is_file()
    first, second = heard[::2], heard[1::2]
    assert len({id(pupil) for pupil, _, _ in first}) == len({id(p) for p, _, _ in second}) == 1
    for step, ((_, mine, given), (_, theirs, taken)) in enumerate(zip(first, second, strict=True)):
        share = 1.0 if step == 0 else 1.0 - 0.4
        assert given.tolist() == small_losses(theirs, share).tolist()
        assert taken.tolist() == small_losses(mine, share).tolist()
    last = heard[-2][1], heard[-1][1]
    assert not torch.equal(*last), "the models draw other noise"
    assert all((picked == 0).any() for _, margin, picked in heard[2:] if len(margin) > 1)


def test_without_wrong_labels_both_learn_from_all_and_the_first_is_plain_dpo(experiment):
    plain = train(load_config(experiment(name="plain", **TRAINED)), progress=False)
    run = co_teaching.co_teaching(load_config(experiment(name="two", **TRAINED)))
    expected, found = weights(plain), weights(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (run / "minority.csv").read_bytes() == (plain / "minority.csv").read_bytes()
    assert train_with(load_config(experiment(name="two", **TRAINED)), None) == run
