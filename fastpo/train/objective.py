"""From the configuration's objective to the function that trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fastpo import loss
from fastpo.config import AdaptiveOptions, TrainConfig
from fastpo.loss import PairLoss
from fastpo.train.batch_statistics import Reduce
from fastpo.types import PairPredictions

LossFunction = Callable[..., PairLoss]
"""`(predictions, target, minority, pair_weight, beta)`; `beta` may be left out."""
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


def build_loss(config: TrainConfig, reduce: Reduce | None = None) -> LossFunction:
    """Returns `loss(predictions, target, minority, pair_weight)` for the configured objective.

    `minority` is `(B,)`, a metric that takes the annotators' place, or None; objectives other than
    the adaptive ones do not use it. `pair_weight` is `(B,)`, or None: it multiplies each pair's
    loss after the log-sigmoid, so margins, and the slope, stay on one scale. A fifth argument is a
    slope, or one for each pair `(B,)`, in the place of the objective's beta. `reduce` is the scope
    of the batch's statistics; see `fastpo.train.batch_statistics`.
    """
    options = config.objective.model_dump(exclude={"name"})
    if reduce is not None:
        options["reduce"] = reduce
    function = partial(LOSSES[config.objective.name], impl=config.loss_impl, **options)
    adaptive = isinstance(config.objective, AdaptiveOptions)

    def loss(
        predictions: PairPredictions,
        target: Tensor,
        minority: Tensor | None,
        weight: Tensor | None,
        beta: Tensor | float | None = None,
    ) -> PairLoss:
        given = [predictions.reference] if config.needs_reference else []
        judges = {"annotators": predictions.annotators, "minority": minority} if adaptive else {}
        slope = {} if beta is None else {"beta": beta}
        return function(predictions.policy, *given, target, pair_weight=weight, **judges, **slope)

    return loss
