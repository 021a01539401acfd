"""The objectives as the configuration names them."""

from typing import get_args

import pytest
import torch

from fastpo import loss as losses
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


def section(**objective):
    raw = {"output_dir": "o", "max_steps": 1, "objective": objective}
    if objective["name"].startswith("adaptive"):
        raw["annotators"] = {"kind": "ema"}
    return TrainConfig.model_validate(raw)


def predictions(apart=1e-3):
    generator = torch.Generator().manual_seed(0)
    policy, noise, first, second = torch.randn(4, 6, 5, generator=generator).unbind()
    votes = (policy + apart * first, policy + apart * second)
    target = torch.randn(3, 5, generator=generator)
    return PairPredictions(policy, policy + apart * noise, votes), target


@pytest.mark.parametrize("kind", ["rms", "l2", "none"])
def test_annotators_margins_are_normalized_as_the_key_says(kind):
    """`none` is the loss's own: the margins as they are, times rho."""
    p, target = predictions()
    options = {"beta": 1000.0, "normalize": kind, "rho": 2.0}
    ours = build_loss(section(name="adaptive_dpo", **options))(p, target, None, None)
    there = losses.adaptive_dpo(
        p.policy, p.reference, target, annotators=p.annotators, weight_scale=10.0, **options
    )
    torch.testing.assert_close(ours.loss, there.loss, rtol=1e-6, atol=0.0)


def test_the_released_sign_of_the_adaptive_margin_can_be_asked_for():
    p, target = predictions()
    ours, released = (
        build_loss(section(name="adaptive_ipo", released_sign=sign, margin_scale=50.0))(
            p, target, None, None
        ).loss
        for sign in (False, True)
    )
    there = losses.adaptive_ipo(
        p.policy, p.reference, target, annotators=p.annotators, beta=1000.0, tau=100.0,
        released_sign=True, margin_scale=50.0, weight_scale=10.0, rho=3.75,
    )  # fmt: skip
    torch.testing.assert_close(released, there.loss, rtol=1e-6, atol=0.0)
    assert not torch.allclose(ours, released)


def test_likes_and_dislikes_have_weights_of_their_own():
    """Worked by hand where policy and reference agree: each term is 1/2 times its weight."""
    p, target = predictions(apart=0.0)
    config = section(name="kto", beta=8.0, liked_weight=3.0, disliked_weight=0.5)
    policy = p.policy.clone().requires_grad_()
    out = build_loss(config)(PairPredictions(policy, p.reference), target, None, None)
    assert out.loss.item() == pytest.approx((3.0 + 0.5) / 4.0)
    assert config.objective.first_loss() == pytest.approx((3.0 + 0.5) / 4.0)
    assert config.objective.fresh_slope() == pytest.approx(8.0 / 8.0 * 1.75)
    with pytest.raises(ValueError, match="liked_weight and disliked_weight are both 0"):
        section(name="kto", liked_weight=0, disliked_weight=0)
