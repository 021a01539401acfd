"""The objectives, one section each; what the options mean stands in `fastpo.loss`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastpo.config.fields import NotNegative, Positive, PositiveInt, Rate, Real, Section


class DpoObjective(Section):
    """`fastpo.loss.dpo`."""

    name: Literal["dpo"]
    beta: Positive = 2500.0
    label_smoothing: Annotated[Real, Field(ge=0.0, lt=0.5)] = 0.0


class RobustDpoObjective(Section):
    """`fastpo.loss.robust_dpo`."""

    name: Literal["robust_dpo"]
    beta: Positive = 2500.0
    label_smoothing: Annotated[Real, Field(ge=0.0, lt=0.5)] = 0.1


class IpoObjective(Section):
    """`fastpo.loss.ipo`."""

    name: Literal["ipo"]
    tau: Positive = 100.0


class HingeObjective(Section):
    """`fastpo.loss.hinge`."""

    name: Literal["hinge"]
    beta: Positive = 2500.0


class KtoObjective(Section):
    """`fastpo.loss.kto`."""

    name: Literal["kto"]
    beta: Positive = 1000.0


class DmpoObjective(Section):
    """`fastpo.loss.dmpo`."""

    name: Literal["dmpo"]
    beta: Positive = 1000.0
    alpha: Annotated[Real, Field(gt=0.0, lt=1.0)] = 0.01


class LinearDpoObjective(Section):
    """`fastpo.loss.linear_dpo`."""

    name: Literal["linear_dpo"]
    beta: Positive = 100.0
    eta: Annotated[Real, Field(ge=0.0, lt=0.5)] = 1e-3


class SdpoObjective(Section):
    """`fastpo.loss.sdpo`."""

    name: Literal["sdpo"]
    beta: Positive = 2500.0
    mu: Rate = 0.9


class SftObjective(Section):
    """`fastpo.loss.sft`: fine-tuning on the winners alone."""

    name: Literal["sft"]


class MapoObjective(Section):
    """`fastpo.loss.mapo`: no reference model."""

    name: Literal["mapo"]
    beta: Positive = 0.1
    snr: Positive = 0.5
    num_timesteps: PositiveInt = 1000


class AdaptiveOptions(Section):
    """What both Adaptive objectives share (arXiv 2503.16921)."""

    beta: Positive = 1000.0
    normalize: Literal["rms", "l2"] = "rms"  # of annotators' margins; the ledger has its own scale
    rho: Positive = 3.75  # likewise
    weight_kind: Literal["linear", "quadratic", "sqrt", "exponential", "gate"] = "linear"
    weight_scale: NotNegative = 10.0
    weight_intercept: Positive = 1.0
    margin_kind: Literal["quadratic", "linear"] = "quadratic"
    margin_scale: NotNegative = 1.0


class AdaptiveDpoObjective(AdaptiveOptions):
    """`fastpo.loss.adaptive_dpo`."""

    name: Literal["adaptive_dpo"]


class AdaptiveIpoObjective(AdaptiveOptions):
    """`fastpo.loss.adaptive_ipo`."""

    name: Literal["adaptive_ipo"]
    tau: Positive = 100.0


ObjectiveConfig = Annotated[
    DpoObjective
    | RobustDpoObjective
    | IpoObjective
    | HingeObjective
    | KtoObjective
    | DmpoObjective
    | LinearDpoObjective
    | SdpoObjective
    | SftObjective
    | MapoObjective
    | AdaptiveDpoObjective
    | AdaptiveIpoObjective,
    Field(discriminator="name"),
]
