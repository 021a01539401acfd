"""The best measurement on held-out pairs so far, and what follows from it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class BestHeldOut(BaseModel):
    """The best measurement so far; a checkpoint keeps it.

    Attributes:
        step: Finished optimizer steps then; 0 before the first measurement.
        accuracy: Its held-out accuracy.
        since: Measurements after it, none of which was better.
    """

    model_config = ConfigDict(extra="ignore")

    step: int = 0
    accuracy: float = -1.0
    since: int = 0

    def take(self, step: int, accuracy: float) -> bool:
        """Enters a measurement; returns whether it is better than all before."""
        if accuracy > self.accuracy:
            self.step, self.accuracy, self.since = step, accuracy, 0
            return True
        self.since += 1
        return False

    def copy_from(self, other: BestHeldOut | None) -> None:
        """Takes the values of a checkpoint; None in one that measured nothing."""
        known = other or BestHeldOut()
        self.step, self.accuracy, self.since = known.step, known.accuracy, known.since

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether so many measurements in a row were no better; never without a patience."""
        return patience is not None and self.since >= patience
