"""The training's section."""

from __future__ import annotations

from pydantic import model_validator

from fastpo.config.train_checks import (
    check_annotators,
    check_backward,
    check_deepspeed,
    check_rounds,
    check_slope,
    check_timesteps,
    check_used,
    check_weights,
)
from fastpo.config.train_keys import TrainKeys


class TrainConfig(TrainKeys):
    """The training."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of train.epochs and train.max_steps")
        check_annotators(self)
        check_rounds(self)
        if self.statistics == "running":
            self.objective.check_running()
        check_used(self)
        check_backward(self)
        check_slope(self)
        check_deepspeed(self)
        check_weights(self)
        check_timesteps(self)
        return self
