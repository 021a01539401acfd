"""How often each timestep of the schedule is drawn."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastpo.config.fields import Count, NotNegative, Positive, Real, Section, decides


class UniformTimesteps(Section):
    """Every timestep of the range equally often, as published."""

    kind: Annotated[Literal["uniform"], decides("reference", "run")] = "uniform"


class ListTimesteps(Section):
    """These timesteps only, each as often as it is listed: SDXL Turbo's are 249, 499, 749, 999."""

    kind: Annotated[Literal["list"], decides("reference", "run")]
    values: Annotated[
        tuple[Count, ...], Field(min_length=1, max_length=65536), decides("reference", "run")
    ]
    """The timesteps, from 0."""


class SigmaTimesteps(Section):
    """Under flow matching these factors of the noise only, each as often as it is listed."""

    kind: Annotated[Literal["sigmas"], decides("reference", "run")]
    values: Annotated[
        tuple[Annotated[Real, Field(gt=0.0, le=1.0)], ...],
        Field(min_length=1, max_length=65536),
        decides("reference", "run"),
    ]
    """In (0, 1], 1 is noise alone; each stands for the nearest of the schedule's thousand."""


class LogitNormalTimesteps(Section):
    """The middle of the range more often: its fraction is the sigmoid of a normal number.

    Esser et al. 2024 (arXiv 2403.03206), section 3.1; a positive mean prefers noisier timesteps.
    """

    kind: Annotated[Literal["logit_normal"], decides("reference", "run")]
    mean: Annotated[Real, decides("reference", "run")] = 0.0
    """Of the normal number."""
    std: Annotated[Positive, decides("reference", "run")] = 1.0
    """Its standard deviation."""


class BinTimesteps(Section):
    """The range cut into equal parts, each drawn in proportion to its weight.

    `[1, 1, 1, 2]` draws the noisiest quarter twice as often as each other quarter.
    """

    kind: Annotated[Literal["bins"], decides("reference", "run")]
    weights: Annotated[tuple[NotNegative, ...], Field(min_length=1), decides("reference", "run")]
    """One for each part, from the least to the most noise."""

    @model_validator(mode="after")
    def _check(self) -> BinTimesteps:
        if not 0.0 < math.fsum(self.weights) < math.inf:
            raise ValueError("train.timesteps.weights: at least one must be positive")
        return self


TimestepsConfig = Annotated[
    UniformTimesteps | ListTimesteps | SigmaTimesteps | LogitNormalTimesteps | BinTimesteps,
    Field(discriminator="kind"),
]
