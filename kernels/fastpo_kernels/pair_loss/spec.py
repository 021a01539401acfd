"""What a pair loss is asked for, reads and gives: plain records, shared by all implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

WeightKind = Literal["linear", "quadratic", "sqrt", "exponential", "gate"]
MarginKind = Literal["quadratic", "linear"]
Normalize = Literal["rms", "l2", "none"]
Reduction = Literal["mean", "none"]
Layout = Literal["halves", "interleaved"]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adaptive:
    """How a pair's minority metric becomes weight and margin (Adaptive-DPO, arXiv 2503.16921).

    `shift_scale` multiplies `mean(d) - u**k / beta`: the margin scale, divided by beta in the IPO
    form.
    """

    beta: float
    normalize: Normalize = "rms"
    rho: float = 3.75
    weight_kind: WeightKind = "linear"
    weight_scale: float = 10.0
    weight_intercept: float = 1.0
    margin_kind: MarginKind = "quadratic"
    shift_scale: float = 1.0


class KernelFlags(NamedTuple):
    """What of a loss a kernel is compiled for; the rest are numbers handed to it."""

    objective: str
    normalize: Normalize | None
    weight_kind: WeightKind | None
    margin_kind: MarginKind | None
    safeguard: bool
    sft: bool
    per_pair: bool


@dataclass(frozen=True)
class LossSpec:
    """One objective with its options.

    Attributes:
        objective: a name in `objectives.OBJECTIVES`.
        options: its numbers, in the order of its function.
        adaptive: weights and margins from the minority metric, or None.
        safeguard: Diffusion-SDPO's mu, or None.
        sft_weight: of the winner's error, which is added to every pair's loss.
        per_pair: whether the result is every pair's loss instead of their mean.
    """

    objective: str
    options: tuple[float, ...] = ()
    adaptive: Adaptive | None = None
    safeguard: float | None = None
    sft_weight: float = 0.0
    per_pair: bool = False

    @property
    def has_baseline(self) -> bool:
        """Whether the batch's mean gain is subtracted: KTO's."""
        return self.objective == "kto"

    @property
    def has_statistics(self) -> bool:
        """Whether a pair's loss depends on the batch."""
        return self.has_baseline or self.adaptive is not None or self.safeguard is not None

    @property
    def flags(self) -> KernelFlags:
        """What a kernel is compiled for."""
        adaptive = self.adaptive
        others = self.safeguard is not None, self.sft_weight != 0, self.per_pair
        if adaptive is None:
            return KernelFlags(self.objective, None, None, None, *others)
        kinds = adaptive.normalize, adaptive.weight_kind, adaptive.margin_kind
        return KernelFlags(self.objective, *kinds, *others)

    def n_sums(self, n_annotators: int) -> int:
        """Length of the batch's sums, 0 where the objective has no batch statistics.

        `sum g` for KTO; `sum d`, then `sum d_m**2` of the policy and every annotator for adaptive;
        `sum e_w` and `sum <pred_w - target, pred_l - target> / N` with a safeguard; last the pairs.
        """
        if not self.has_statistics:
            return 0
        own = 2 + n_annotators if self.adaptive is not None else int(self.has_baseline)
        return own + (2 if self.safeguard is not None else 0) + 1


@dataclass(frozen=True, eq=False)
class PairTensors:
    """What a loss reads.

    Attributes:
        policy: `[2B, *dims]`, winners first; or its errors `[2B]` where they are all that is read.
        target: `[2B, *dims]`, or `[B, *dims]` where the pair shares it.
        reference: `[2B, *dims]`, or errors `[2B]`, or None.
        annotators: each like the reference.
        minority: `[B]` or None.
        statistics: `[1]`, KTO's mean gain; `[1 + M]`, mean margin and scales; or None.
        pair_weight: `[B]` or None.
        beta: `[B]`, every pair's first option, or None: one number for all.
        losers: None where losers are the second half of each tensor; else the predictions above
            are the winners' `[B, *dims]`, and these the losers' of policy, reference, annotators
            and target, each lying as the winners' do; of errors, and of a target that the pair
            shares, the same tensor again.
        mask: `[B, *dims]` or `[2B, *dims]`, winners first, or None: what every squared residual is
            multiplied by, each row's mean being 1.
    """

    policy: Tensor
    target: Tensor
    reference: Tensor | None = None
    annotators: Sequence[Tensor] = ()
    minority: Tensor | None = None
    statistics: Tensor | None = None
    pair_weight: Tensor | None = None
    beta: Tensor | None = None
    losers: tuple[Tensor, ...] | None = None
    mask: Tensor | None = None

    @property
    def n_pairs(self) -> int:
        """B."""
        return self.policy.shape[0] // (2 if self.losers is None else 1)

    @property
    def judges(self) -> list[Tensor]:
        """The reference, if there is one, and the annotators."""
        if self.reference is None:
            return list(self.annotators)
        return [self.reference, *self.annotators]

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Policy, then reference and annotators."""
        if self.reference is None:
            return (self.policy, *self.annotators)
        return (self.policy, self.reference, *self.annotators)


class PairLoss(NamedTuple):
    """Result of a pair loss. What is made of the policy's errors carries their gradient.

    A term on `policy_error` or `margin` may be added to the loss; the backward pass stays one
    launch. Detach what is kept beyond the step.

    Attributes:
        loss: scalar, float32 (float64 for float64 predictions), differentiable; `[B]` with
            `reduction="none"`.
        margin: `[B]`, `(r_w - r_l) - (e_w - e_l)`, differentiable; without a reference r is 0.
        policy_error: `[2B]`, mean squared error of every row, winners first, differentiable.
        reference_error: `[2B]`, or None without a reference.
        minority: `[B]`, the minority metric u, or None where the objective has none.
        weight: `[B]`, what every pair's loss was multiplied by, or None if by nothing.
        safeguard: scalar, the factor of the loser's gradient, or None without a safeguard.
    """

    loss: Tensor
    margin: Tensor
    policy_error: Tensor
    reference_error: Tensor | None
    minority: Tensor | None
    weight: Tensor | None
    safeguard: Tensor | None = None


class Part(NamedTuple):
    """A part of a vector."""

    start: int
    length: int

    def of(self, vector: Tensor) -> Tensor:
        """The view of it."""
        return vector.narrow(0, self.start, self.length)


class StatsLayout(NamedTuple):
    """The kernels' one float32 vector of results, so that a step allocates once.

    `margin [B] | errors [S, 2B] | minority [B] | weight [B] | coefficients [2B] | safeguard [1]`,
    the errors of policy, reference and annotators, S sources in all; a coefficient is dloss/de of a
    row. The last is there with a safeguard.
    """

    n_pairs: int
    n_sources: int
    guarded: bool = False

    @property
    def size(self) -> int:
        """Length of the vector."""
        return (5 + 2 * self.n_sources) * self.n_pairs + int(self.guarded)

    @property
    def margin(self) -> Part:
        """`[B]`."""
        return Part(0, self.n_pairs)

    def errors(self, source: int) -> Part:
        """`[2B]`, of one source."""
        return Part((1 + 2 * source) * self.n_pairs, 2 * self.n_pairs)

    @property
    def minority(self) -> Part:
        """`[B]`."""
        return Part((1 + 2 * self.n_sources) * self.n_pairs, self.n_pairs)

    @property
    def weight(self) -> Part:
        """`[B]`."""
        return Part((2 + 2 * self.n_sources) * self.n_pairs, self.n_pairs)

    @property
    def coefficients(self) -> Part:
        """`[2B]`."""
        return Part((3 + 2 * self.n_sources) * self.n_pairs, 2 * self.n_pairs)

    @property
    def safeguard(self) -> Part:
        """`[1]`, where there is one."""
        return Part(self.size - 1, 1)


class PartialsLayout(NamedTuple):
    """Results of the pass over the predictions alone: `errors [S, 2B] | sums`."""

    n_pairs: int
    n_sources: int
    n_sums: int

    @property
    def size(self) -> int:
        """Length of the vector."""
        return 2 * self.n_sources * self.n_pairs + self.n_sums

    def errors(self, source: int) -> Part:
        """`[2B]`, of one source."""
        return Part(2 * source * self.n_pairs, 2 * self.n_pairs)

    @property
    def sums(self) -> Part:
        """`LossSpec.n_sums`, in its order."""
        return Part(2 * self.n_sources * self.n_pairs, self.n_sums)
