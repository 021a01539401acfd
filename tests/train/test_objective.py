"""The objectives as the configuration names them."""

from typing import get_args

import pytest
import torch

from fastpo.config import ObjectiveConfig, TrainConfig
from fastpo.train.objective import build_loss
from fastpo.types import PairPredictions

NAMES = [
    get_args(section.model_fields["name"].annotation)[0]
    for section in get_args(get_args(ObjectiveConfig)[0])
]


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_weight_multiplies_the_pairs_loss_of_every_objective(name):
    """The margin is left alone, and a pair of weight 0 gets no gradient."""
    loss = build_loss(
        TrainConfig.model_validate({"output_dir": "o", "max_steps": 1, "objective": {"name": name}})
    )
    generator = torch.Generator().manual_seed(0)
    policy, apart = torch.randn(2, 4, 5, generator=generator).unbind()
    reference = policy + 1e-4 * apart  # a logit of order 1, where no slope saturates
    target = torch.randn(2, 5, generator=generator)
    policy.requires_grad_()
    minority = torch.zeros(2)  # of no use to any but the adaptive ones
    predictions = PairPredictions(policy, reference)
    plain = loss(predictions, target, minority, None)
    doubled = loss(predictions, target, minority, torch.full((2,), 2.0))
    torch.testing.assert_close(doubled.loss, 2.0 * plain.loss)
    assert torch.equal(doubled.margin, plain.margin)
    loss(predictions, target, minority, torch.tensor([1.0, 0.0])).loss.backward()
    assert policy.grad[[0, 2]].any()
    assert not policy.grad[[1, 3]].any()
