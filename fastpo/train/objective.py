"""From the configuration's objective to the function that trains, and what it says of its slope."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

import fastpo.loss
from fastpo.config import AdaptiveOptions, Section, TrainConfig
from fastpo.loss import PairLoss
from fastpo.train.batch_statistics import Reduce
from fastpo.types import PairPredictions

LossFunction = Callable[[PairPredictions, Tensor, Tensor | None, Tensor | None], PairLoss]
REFERENCE_FREE = ("sft", "mapo")


def needs_reference(config: TrainConfig) -> bool:
    """Whether the objective compares the policy with a frozen reference."""
    return config.objective.name not in REFERENCE_FREE


def runs_reference(config: TrainConfig) -> bool:
    """Whether training holds a reference model and runs it at each step."""
    return needs_reference(config) and config.reference == "live"


def build_loss(config: TrainConfig, reduce: Reduce | None = None) -> LossFunction:
    """Returns `loss(predictions, target, minority, pair_weight)` for the configured objective.

    `minority` is `(B,)`, a metric that takes the annotators' place, or None; objectives other than
    the adaptive ones have no use for it. `pair_weight` is `(B,)`, or None: it multiplies each
    pair's loss after the log-sigmoid, so margins, and the slope, stay on one scale.
    `reduce` is the scope of the batch's statistics; see `fastpo.train.batch_statistics`.
    """
    options = config.objective.model_dump(exclude={"name"})
    if reduce is not None:
        options["reduce"] = reduce
    function = partial(
        getattr(fastpo.loss, config.objective.name), impl=config.loss_impl, **options
    )
    if isinstance(config.objective, AdaptiveOptions):
        return lambda p, target, minority, weight: function(
            p.policy,
            p.reference,
            target,
            annotators=p.annotators,
            minority=minority,
            pair_weight=weight,
        )
    if needs_reference(config):
        return lambda p, target, _, weight: function(
            p.policy, p.reference, target, pair_weight=weight
        )
    return lambda p, target, _, weight: function(p.policy, target, pair_weight=weight)


def describe_slope(objective: Section) -> str:
    """States the slope of the logit, and the published flags that mean the same."""
    beta = getattr(objective, "beta", None)
    name = getattr(objective, "name", "")
    if name == "mapo":
        options = objective.model_dump()
        slope = options["num_timesteps"] * options["snr"] / 2
        return f"about {slope:g} per unit of error, weight {beta:g} (reference-free)"
    if name in ("ipo", "adaptive_ipo"):
        tau = objective.model_dump()["tau"]
        return f"none: the margin is regressed on 1/(2 tau) = {1 / (2 * tau):g}"
    if beta is None:
        return "none (supervised)"
    if name in ("kto", "linear_dpo"):
        return f"{beta:g}, as in the method's own flag"
    same = "DMPO --beta" if name == "dmpo" else "Salesforce and diffusers SDXL --beta_dpo"
    return f"{beta:g} = {same} {2 * beta:g}, diffusers SD1.5 and Adaptive-DPO --beta_dpo {beta:g}"


def initial_loss(objective: Section) -> float | None:
    """The loss at the first step, where policy and reference agree; None where it is not fixed."""
    name = getattr(objective, "name", "")
    if name in ("dpo", "robust_dpo", "sdpo"):
        return math.log(2.0)
    return {"hinge": 1.0, "kto": 0.5}.get(name)
