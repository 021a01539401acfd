"""Checks of an objective's options."""

from __future__ import annotations

import math

from torch import Tensor

from fastpo_kernels.pair_loss.validate import check_constant, number

Slope = float | Tensor


def require(holds: bool, rule: str, got: float) -> None:
    """A check of the option that `rule` begins with.

    Write `holds` so that NaN makes it false. A tensor that wants a gradient is refused.
    """
    if isinstance(got, Tensor):
        check_constant(rule.partition(" ")[0], got)
    if not holds:
        raise ValueError(f"{rule}, got {got}")


def require_positive(**options: float) -> None:
    """Refuses an option, given by its name, that is not positive and finite."""
    for name, value in options.items():
        if not 0 < number(name, value) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def require_finite(**options: float) -> None:
    """Refuses an option, given by its name, that is NaN or infinite."""
    for name, value in options.items():
        if not math.isfinite(number(name, value)):
            raise ValueError(f"{name} must be finite, got {value}")


def require_slope(beta: Slope) -> None:
    """Refuses a number that is not positive and finite; values on a device are not read."""
    if isinstance(beta, Tensor) and (beta.ndim or beta.device.type != "cpu"):
        check_constant("beta", beta)
    else:
        require_positive(beta=beta)  # pyright: ignore[reportArgumentType]


def require_terms(safeguard: float | None, sft_weight: float) -> None:
    """The options that every objective has: mu in [0, 1], a weight that is not negative."""
    if safeguard is not None:
        rule = "safeguard (mu) must be in [0, 1]"
        require(0 <= number("safeguard", safeguard) <= 1, rule, safeguard)
    weight = number("sft_weight", sft_weight)
    rule = "sft_weight must be finite and not negative"
    require(0 <= weight < math.inf, rule, weight)
