"""Says so when the policy gets worse at the images that people preferred.

A margin `(r_w - r_l) - (e_w - e_l)` also grows where both errors do, if the loser's grows faster:
the known failure of DPO on diffusion models. Loss and accuracy look well then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

STEPS = 50  # that are looked at together
SURE = 4.0  # standard errors


class WinnerWatch:
    """Looks at `STEPS` steps at a time, and tells once in a run.

    It tells when the winners' error over the reference's is above zero by `SURE` standard errors of
    its mean, and above the mean margin: more has been lost on winners than was won over losers.

    Args:
        compared: Whether the run has a reference, without which an error says nothing.
    """

    def __init__(self, *, compared: bool) -> None:
        self._open = compared
        self._seen: list[tuple[float, float]] = []

    def see(self, metrics: Mapping[str, float]) -> str | None:
        """Takes a step's metrics in; returns the warning when it is due, else None."""
        if not self._open:
            return None
        self._seen.append((metrics["error/winner"], metrics["rewards/margins"]))
        if len(self._seen) < STEPS:
            return None
        errors, margins = zip(*self._seen, strict=True)
        self._seen.clear()
        mean, margin = math.fsum(errors) / STEPS, math.fsum(margins) / STEPS
        spread = math.sqrt(math.fsum((e - mean) ** 2 for e in errors) / (STEPS - 1) / STEPS)
        if mean <= max(SURE * spread, margin, 0.0):
            return None
        self._open = False
        return (
            f"step {round(metrics['step'])}: the winners' own error has grown, by {mean:.2g} over "
            f"the reference's in the last {STEPS} steps, more than the margin over the losers "
            f"({margin:.2g}). Images may get worse: a lower slope or rate helps, and so does sdpo"
        )
