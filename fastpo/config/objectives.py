"""The objectives, one section each with its facts; `fastpo.loss` explains what the options mean."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from fastpo.config.fields import (
    Fraction,
    NotNegative,
    Positive,
    PositiveInt,
    Rate,
    Real,
    Section,
    decides,
)

Smoothing = Annotated[Real, Field(ge=0.0, lt=0.5)]


class Objective(Section):
    """Base of all objectives, with what other stages ask of one."""

    needs_reference: ClassVar[bool] = True
    """Whether the loss compares the policy with a frozen reference model."""
    has_batch_statistics: ClassVar[bool] = False
    """Whether the loss of a pair depends on sums over the other pairs of the batch."""
    has_logit: ClassVar[bool] = True
    """Whether the margin d enters the loss as a logit z = beta d."""
    initial_loss: ClassVar[float | None] = None
    """The loss while policy and reference agree; None where it is not a fixed number."""

    @abstractmethod
    def describe_slope(self) -> str:
        """States the slope of the logit, and the published flags that mean the same."""

    def first_loss(self) -> float | None:
        """The loss while policy and reference agree; None where it is not a fixed number."""
        return self.initial_loss

    def fresh_slope(self) -> float:
        """`|dloss/de|` of a pair of weight 1 on which policy and reference agree.

        The unit of a pair's gradient scale, see `train.backward`; 1 where there is no reference.
        """
        return 1.0

    def logit_slope(self) -> float | None:
        """The beta of the logit z = beta d; None where the loss has no logit."""
        return self.model_dump()["beta"] if self.has_logit else None

    def with_slope(self, beta: float) -> Self:
        """The same objective with another beta."""
        return self.model_copy(update={"beta": beta})

    def check_running(self) -> None:
        """Refuses `train.statistics: running` where the statistics cannot run over steps.

        Raises:
            ValueError: The objective needs the batch at hand.
        """


def _slope(beta: float, same: str = "Salesforce and diffusers SDXL --beta_dpo") -> str:
    """A slope `beta`, and its value as the flag of trainers that write `0.5 * flag * margin`."""
    return f"{beta:g} = {same} {2 * beta:g}, diffusers SD1.5 and Adaptive-DPO --beta_dpo {beta:g}"


def _own_slope(beta: float) -> str:
    return f"{beta:g}, as in the method's own flag"


def _regression(tau: float) -> str:
    return f"none: the margin is regressed on 1/(2 tau) = {1 / (2 * tau):g}"


class DpoObjective(Objective):
    """`fastpo.loss.dpo`."""

    initial_loss: ClassVar[float | None] = math.log(2.0)

    name: Annotated[Literal["dpo"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 2500.0
    """Slope of the margin inside the log-sigmoid."""
    label_smoothing: Annotated[Smoothing, decides("run")] = 0.0
    """Assumed share of wrong labels, below 1/2 (conservative DPO)."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _slope(self.beta)

    def fresh_slope(self) -> float:
        """See the base class."""
        return self.beta * (0.5 - self.label_smoothing)


class RobustDpoObjective(Objective):
    """`fastpo.loss.robust_dpo`."""

    initial_loss: ClassVar[float | None] = math.log(2.0)

    name: Annotated[Literal["robust_dpo"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 2500.0
    """Slope of the margin inside the log-sigmoid."""
    label_smoothing: Annotated[Smoothing, decides("run")] = 0.1
    """Known share of wrong labels, below 1/2."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _slope(self.beta)

    def fresh_slope(self) -> float:
        """See the base class."""
        return self.beta / (2.0 - 4.0 * self.label_smoothing)


class PolyDpoObjective(Objective):
    """`fastpo.loss.poly_dpo`."""

    name: Annotated[Literal["poly_dpo"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 2500.0
    """Slope of the margin inside the log-sigmoid."""
    alpha: Annotated[Annotated[Real, Field(ge=-1.0)], decides("run")] = 8.0
    """Of the term alpha (1 - sigmoid(z)): about 8 on Pick-a-Pic v2, near 0 on clean labels."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _slope(self.beta)

    def fresh_slope(self) -> float:
        """See the base class."""
        return self.beta * (2.0 + self.alpha) / 4.0


class IpoObjective(Objective):
    """`fastpo.loss.ipo`."""

    has_logit: ClassVar[bool] = False

    name: Annotated[Literal["ipo"], decides("run")]
    tau: Annotated[Positive, decides("run")] = 100.0
    """The margin is regressed on 1 / (2 tau)."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _regression(self.tau)

    def fresh_slope(self) -> float:
        """See the base class."""
        return 1.0 / self.tau


class HingeObjective(Objective):
    """`fastpo.loss.hinge`."""

    initial_loss: ClassVar[float | None] = 1.0

    name: Annotated[Literal["hinge"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 2500.0
    """Slope of the margin inside the log-sigmoid."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _slope(self.beta)

    def fresh_slope(self) -> float:
        """See the base class."""
        return self.beta


class KtoObjective(Objective):
    """`fastpo.loss.kto`."""

    has_batch_statistics: ClassVar[bool] = True
    has_logit: ClassVar[bool] = False
    initial_loss: ClassVar[float | None] = 0.5

    name: Annotated[Literal["kto"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 1000.0
    """Slope of an image's gain over the reference inside the sigmoid."""
    liked_weight: Annotated[NotNegative, decides("run")] = 1.0
    """Weight of the winners' terms: TRL's `desirable_weight`."""
    disliked_weight: Annotated[NotNegative, decides("run")] = 1.0
    """Weight of the losers' terms: TRL's `undesirable_weight`."""

    @property
    def _mean_weight(self) -> float:
        return (self.liked_weight + self.disliked_weight) / 2.0

    def describe_slope(self) -> str:
        """See the base class."""
        return _own_slope(self.beta)

    def first_loss(self) -> float | None:
        """See the base class."""
        return 0.5 * self._mean_weight

    def fresh_slope(self) -> float:
        """See the base class; the mean of both images."""
        return self._mean_weight * self.beta / 8.0

    @model_validator(mode="after")
    def _check(self) -> KtoObjective:
        if not self._mean_weight:
            raise ValueError(
                "train.objective: liked_weight and disliked_weight are both 0, which trains nothing"
            )
        return self


class DmpoObjective(Objective):
    """`fastpo.loss.dmpo`."""

    name: Annotated[Literal["dmpo"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 1000.0
    """Slope of the margin inside the log-sigmoid."""
    alpha: Annotated[Fraction, decides("run")] = 0.01
    """The assumed probability that the loser is preferred."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _slope(self.beta, "DMPO --beta")

    def fresh_slope(self) -> float:
        """See the base class; near alpha = 1/2, where that vanishes, of a logit one away."""
        return self.beta * max(abs(math.log(1.0 / self.alpha - 1.0)), 1.0) / 4.0


class LinearDpoObjective(Objective):
    """`fastpo.loss.linear_dpo`."""

    name: Annotated[Literal["linear_dpo"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 100.0
    """Slope, as in the method's own flag."""
    eta: Annotated[Smoothing, decides("run")] = 1e-3
    """The least weight of a pair; the largest is 1 - eta."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _own_slope(self.beta)

    def fresh_slope(self) -> float:
        """See the base class."""
        return 0.5


class SdpoObjective(Objective):
    """`fastpo.loss.sdpo`."""

    has_batch_statistics: ClassVar[bool] = True
    initial_loss: ClassVar[float | None] = math.log(2.0)

    name: Annotated[Literal["sdpo"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 2500.0
    """Slope of the margin inside the log-sigmoid."""
    mu: Annotated[Rate, decides("run")] = 0.9
    """How much of the winner's gain must remain: 0.9 as released for SD1.5, 0.6 for SDXL."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _slope(self.beta)

    def check_running(self) -> None:
        """See the base class."""
        raise ValueError(
            "train.statistics: sdpo's safeguard holds for the batch at hand; use processes or "
            "micro_batch, not running"
        )

    def fresh_slope(self) -> float:
        """See the base class."""
        return self.beta / 2.0


class SftObjective(Objective):
    """`fastpo.loss.sft`: fine-tuning on the winners alone."""

    needs_reference: ClassVar[bool] = False
    has_logit: ClassVar[bool] = False

    name: Annotated[Literal["sft"], decides("run")]

    def describe_slope(self) -> str:
        """See the base class."""
        return "none (supervised)"


class MapoObjective(Objective):
    """`fastpo.loss.mapo`: no reference model."""

    needs_reference: ClassVar[bool] = False
    has_logit: ClassVar[bool] = False

    name: Annotated[Literal["mapo"], decides("run")]
    beta: Annotated[Positive, decides("run")] = 0.1
    """Weight of the preference's term beside the winner's error."""
    snr: Annotated[Positive, decides("run")] = 0.5
    """The s in f(e) = s e / expm1(s e), as released."""
    num_timesteps: Annotated[PositiveInt, decides("run")] = 1000
    """T, which multiplies f(e_w) - f(e_l), as released."""

    def describe_slope(self) -> str:
        """See the base class."""
        slope = self.num_timesteps * self.snr / 2
        return f"about {slope:g} per unit of error, weight {self.beta:g} (reference-free)"


class AdaptiveOptions(Objective):
    """What both Adaptive objectives share (arXiv 2503.16921)."""

    has_batch_statistics: ClassVar[bool] = True

    beta: Annotated[Positive, decides("run")] = 1000.0
    """Slope of the margin inside the log-sigmoid."""
    normalize: Annotated[Literal["rms", "l2", "none"], decides("run")] = "rms"
    """How annotators' margins are brought on one scale: by their rms over the batch, their l2 norm
    as released, or not at all; the ledger has its own."""
    rho: Annotated[Positive, decides("run")] = 3.75
    """Factor of annotators' normalized margins inside the sigmoid; not of the ledger's."""
    weight_kind: Annotated[
        Literal["linear", "quadratic", "sqrt", "exponential", "gate"], decides("run")
    ] = "linear"
    """How a pair's weight falls with its minority metric u; gate: 1 where u < 1/2, else 0."""
    weight_scale: Annotated[NotNegative, decides("run")] = 10.0
    """The k1 of `fastpo.loss.adaptive_dpo`."""
    weight_intercept: Annotated[Positive, decides("run")] = 1.0
    """Its k0."""
    margin_kind: Annotated[Literal["quadratic", "linear"], decides("run")] = "quadratic"
    """Whether u or its square enters the adaptive margin."""
    margin_scale: Annotated[NotNegative, decides("run")] = 1.0
    """Factor of the adaptive margin; 1 as released, where it is tiny."""

    def check_running(self) -> None:
        """See the base class."""
        if self.normalize == "l2":
            raise ValueError(
                "train.statistics: running has no batch over which to take an l2 norm; use "
                "train.objective.normalize: rms"
            )


class AdaptiveDpoObjective(AdaptiveOptions):
    """`fastpo.loss.adaptive_dpo`."""

    name: Annotated[Literal["adaptive_dpo"], decides("run")]

    def describe_slope(self) -> str:
        """See the base class."""
        return _slope(self.beta)

    def fresh_slope(self) -> float:
        """See the base class."""
        return self.beta / 2.0


class AdaptiveIpoObjective(AdaptiveOptions):
    """`fastpo.loss.adaptive_ipo`."""

    has_logit: ClassVar[bool] = False

    name: Annotated[Literal["adaptive_ipo"], decides("run")]
    tau: Annotated[Positive, decides("run")] = 100.0
    """The margin is regressed on 1 / (2 tau)."""
    released_sign: Annotated[bool, decides("run")] = False
    """Adds the adaptive margin, as the released IPO form does; ours, and its DPO form, subtract."""

    def describe_slope(self) -> str:
        """See the base class."""
        return _regression(self.tau)

    def fresh_slope(self) -> float:
        """See the base class."""
        return 1.0 / self.tau


ObjectiveConfig = Annotated[
    DpoObjective
    | RobustDpoObjective
    | PolyDpoObjective
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
OBJECTIVES: dict[str, type[Objective]] = {
    get_args(section.model_fields["name"].annotation)[0]: section
    for section in get_args(get_args(ObjectiveConfig)[0])
}
"""Every objective's section by its name."""
