"""How far a pair's logit is from zero, where its loss has another one than `z = beta d`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.config.objectives import KtoObjective, MapoObjective, Objective
from fastpo.loss import PairLoss


def logit_sizes(objective: Objective, out: PairLoss, totals: Tensor | None) -> Tensor | None:
    """The size of each pair's logit, `(B,)` float64; None where it is `z = beta d`, or none.

    * KTO judges the images one by one, by `beta (g - z0)` with `g = r - e`: the smaller size of the
      two, for a pair is saturated where both of its sigmoids are.
    * MaPO: `T (f(e_w) - f(e_l))`, `f(e) = s e / expm1(s e)`, which holds the preference's part of
      its loss.

    Args:
        objective: The run's.
        out: The loss of B pairs.
        totals: KTO's `sum g | pairs`, as the loss got them from its `reduce`; None: it took the
            mean of these pairs.
    """
    errors = out.policy_error.detach().double()
    if isinstance(objective, KtoObjective):
        assert out.reference_error is not None, "kto needs a reference"
        gains = out.reference_error.double() - errors
        mean = gains.mean() if totals is None else totals[0].double() / totals[-1].double()
        winner, loser = (gains - mean.clamp(min=0.0)).abs().chunk(2)
        return objective.beta * torch.minimum(winner, loser)
    if isinstance(objective, MapoObjective):
        x = objective.snr * errors
        winner, loser = torch.where(x == 0.0, 1.0, x / torch.expm1(x)).chunk(2)
        return objective.num_timesteps * (winner - loser).abs()
    return None
