"""From the configuration's objective to the function that trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fastpo import loss
from fastpo.config import AdaptiveOptions, TrainConfig
from fastpo.loss import PairLoss
from fastpo.train.auto_slope import AutoSlope
from fastpo.train.batch_statistics import Reduce
from fastpo.types import PairPredictions

LossFunction = Callable[[PairPredictions, Tensor, Tensor | None, Tensor | None], PairLoss]
LOSSES: dict[str, Callable[..., PairLoss]] = {
    "dpo": loss.dpo,
    "robust_dpo": loss.robust_dpo,
    "poly_dpo": loss.poly_dpo,
    "ipo": loss.ipo,
    "hinge": loss.hinge,
    "kto": loss.kto,
    "dmpo": loss.dmpo,
    "linear_dpo": loss.linear_dpo,
    "sdpo": loss.sdpo,
    "sft": partial(loss.sft, rows="pairs"),
    "mapo": loss.mapo,
    "adaptive_dpo": loss.adaptive_dpo,
    "adaptive_ipo": loss.adaptive_ipo,
}


def build_loss(
    config: TrainConfig, reduce: Reduce | None = None, slope: AutoSlope | None = None
) -> LossFunction:
    """Returns `loss(predictions, target, minority, pair_weight)` for the configured objective.

    `minority` is `(B,)`, a metric that takes the annotators' place, or None; objectives other than
    the adaptive ones do not use it. `pair_weight` is `(B,)`, or None: it multiplies each pair's
    loss after the log-sigmoid, so margins, and the slope, stay on one scale. `reduce` is the scope
    of the batch's statistics; see `fastpo.train.batch_statistics`. `slope`, if it is given, takes
    the place of the objective's beta at each call.
    """
    options = config.objective.model_dump(exclude={"name"})
    if reduce is not None:
        options["reduce"] = reduce
    function = partial(LOSSES[config.objective.name], impl=config.loss_impl, **options)
    if slope is not None:
        function = _following(function, slope)
    if isinstance(config.objective, AdaptiveOptions):
        return lambda p, target, minority, weight: function(
            p.policy,
            p.reference,
            target,
            annotators=p.annotators,
            minority=minority,
            pair_weight=weight,
        )
    if config.needs_reference:
        return lambda p, target, _, weight: function(
            p.policy, p.reference, target, pair_weight=weight
        )
    return lambda p, target, _, weight: function(p.policy, target, pair_weight=weight)


def _following(function: Callable[..., PairLoss], slope: AutoSlope) -> Callable[..., PairLoss]:
    """The loss with the slope of the moment."""

    def with_slope(*tensors: object, **options: object) -> PairLoss:
        return function(*tensors, **options, beta=slope.value)

    return with_slope
