"""Rivals of the ledger: soft labels by hand, against plain runs, and Semi-DPO in small."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastpo.config import load_config, parse_config, with_keys
from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.ledger import BINS
from fastpo.study import rivals
from fastpo.study.rivals import (
    Known,
    Mixture,
    is_agreed,
    pseudo_labels,
    semi_dpo,
    told,
    train_on,
)
from fastpo.train import train
from fastpo.train.metrics import COLUMNS, StepTable

DPO = {"max_steps": 2, "checkpoint_every": 9, "sample_latents": False}


def table(index, margin):
    rows = torch.zeros(len(index), len(COLUMNS), dtype=torch.float64)
    rows[:, COLUMNS.index("index")] = torch.tensor(index, dtype=torch.float64)
    rows[:, COLUMNS.index("margin")] = torch.tensor(margin, dtype=torch.float64)
    return StepTable(rows, grad_norm=0.0, learning_rate=0.0, moved=True)


def test_the_mixture_by_hand():
    """Slope 2, a fifth wrong at the beginning; two pairs with logits 1 and -3, one not seen."""
    mixture = Mixture(3, slope=2.0)
    right, wrong = mixture.shares(torch.tensor([2, 0]), torch.zeros(2))
    assert wrong.tolist() == pytest.approx([0.2, 0.2]) and right.tolist() == pytest.approx(
        [0.8, 0.8]
    )
    mixture.see(table([0, 1], [0.5, -1.5]))
    q = [0.2 / (0.2 + 0.8 * math.exp(z)) for z in (1.0, -3.0)]
    assert mixture.flips == pytest.approx(sum(q) / 2)
    f = mixture.flips
    expected = [f / (f + (1 - f) * math.exp(z)) for z in (1.0, -3.0, 0.0)]
    assert mixture.doubts().tolist() == pytest.approx(expected)
    for _ in range(3):
        mixture.see(table([0, 1], [-50.0, -50.0]))
    assert mixture.flips == 0.5, "not more than a half, or the labels mean the opposite"


def test_pseudo_labels_by_hand():
    """One interval of two judgments a pair; of sizes 4, 3, 2, 1 the larger half counts."""
    margins = np.array([[3.0, 1.0], [-1.0, -2.0], [1.5, 0.5], [-0.5, -0.5], [-9.0, -9.0]])
    places = np.full((5, 2), 250)
    agreed = np.array([False, False, False, False, True])
    signs = pseudo_labels(margins, places, agreed, 1000)
    assert signs.shape == (5, BINS)
    assert signs[:, 2].tolist() == [1, -1, 0, 0, 1]
    assert signs[:4, [0, 1, 3]].abs().sum() == 0 and signs[4].tolist() == [1] * BINS
    right, wrong = rivals.PseudoLabels(signs, 1000).shares(
        torch.tensor([0, 1, 2]), torch.tensor([299, 200, 250])
    )
    assert right.tolist() == [1.0, 0.0, 0.0] and wrong.tolist() == [0.0, 1.0, 0.0]


class Constant:
    """The same belief of all labels."""

    def __init__(self, right, wrong):
        self.of = right, wrong

    def shares(self, index, places):
        return tuple(torch.full((len(index),), share) for share in self.of)

    def see(self, table):
        pass


def test_labels_that_are_certainly_wrong_train_as_flipped_ones_do(experiment):
    plain = load_config(experiment(name="plain", data={"flip_rate": 0.999999}, **DPO))
    soft = load_config(experiment(name="soft", **DPO))
    expected = load_file(
        train(plain, progress=False) / "final" / "pytorch_lora_weights.safetensors"
    )
    run = train_on(soft, lambda cache: Constant(0.0, 1.0))
    found = load_file(run / "final" / "pytorch_lora_weights.safetensors")
    for name, tensor in expected.items():
        # Adam divides by the gradient's size, so one near zero moves by its rounding.
        assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert train_on(soft, None) == run, "a finished run is not made again"


def test_pairs_that_are_known_to_be_wrong_are_left_out(experiment):
    known = Known(torch.tensor([False, True, False]))
    right, wrong = known.shares(torch.tensor([1, 2]), torch.tensor([5, 6]))
    assert right.tolist() == [0.0, 1.0] and wrong.tolist() == [0.0, 0.0]
    everything = {**DPO, "optim": {"lr": 1e-3, "weight_decay": 0.0}}
    run = told(load_config(experiment(data={"flip_rate": 0.999999}, **everything)))
    found = load_file(run / "final" / "pytorch_lora_weights.safetensors")
    assert all(not tensor.any() for name, tensor in found.items() if ".lora_B." in name)


def test_semi_dpo_in_small(experiment, monkeypatch):
    monkeypatch.setattr(rivals, "AGREED", 0.5)
    monkeypatch.setattr(rivals, "DRAWS", 2)
    path = experiment(data={"flip_rate": 0.3}, **{**DPO, "max_steps": 1})
    config = load_config(path)
    prepare(config, progress=False)
    run, passes = semi_dpo(config)
    folder, cache = config.train.output_dir, PairCache.open(config)
    share = 0.5 / 0.7
    agreed = np.array([is_agreed(name, share, config.seed) for name in cache.pair_ids])
    agreed &= ~cache.flipped.numpy()
    assert 0 < agreed.sum() < len(agreed)
    first = with_keys(
        config.model_dump(mode="json"),
        {
            **{"data.source": "folder", "data.path": str(folder / "agreed"), "data.flip_rate": 0.0},
            "prepare.cache_dir": str(folder / "cache"),
        },
    )
    names = {name for name, a in zip(cache.pair_ids, agreed, strict=True) if a}
    assert set(PairCache.open(parse_config(first)).pair_ids) == names
    judged = np.load(folder / "judged.npz")
    assert not judged["margins"][agreed].any() and judged["margins"][~agreed].all()
    assert run == folder / "second" and (run / "final").is_dir()
    part = agreed.mean()
    size = config.train.micro_batch_size  # of the one micro-batch of each run
    epochs = [1.0 / math.ceil(count / size) for count in (agreed.sum(), len(agreed))]
    expected = 4.0 * part * epochs[0] + 2.0 * 2.0 * (1.0 - part) + 4.0 * epochs[1]
    assert passes == pytest.approx(expected, rel=1e-4)
    assert semi_dpo(config) == (run, passes)
