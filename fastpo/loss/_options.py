"""Checks of an objective's options."""

from __future__ import annotations

import math


def require(holds: bool, rule: str, got: float) -> None:
    """A check that also refuses NaN: write `holds` so that NaN makes it false."""
    if not holds:
        raise ValueError(f"{rule}, got {got}")


def require_positive(**options: float) -> None:
    """Refuses an option, given by its name, that is not positive and finite."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def require_finite(**options: float) -> None:
    """Refuses an option, given by its name, that is NaN or infinite."""
    for name, value in options.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
