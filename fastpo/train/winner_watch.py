"""Says so when the policy gets worse at the images that people preferred.

A margin `(r_w - r_l) - (e_w - e_l)` also grows where both errors do, if the loser's grows faster:
the known failure of DPO on diffusion models. Loss and accuracy look well then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastpo.config import TrainConfig
from fastpo.train.metrics import StepTable

STEPS = 50  # that are looked at together
SURE = 4.0  # standard errors
NOTABLE = 0.01  # of the reference's error
NAME = "winner_watch"


class WinnerWatch:
    """Looks at `STEPS` steps of a round at a time, and tells once in a run.

    Each step gives the mean of the winners' error over the reference's, `e_w - r_w`. It tells when
    the mean of these over the steps is above `SURE` standard errors of itself, the standard
    deviation between steps over `sqrt(STEPS)`, and above `NOTABLE` times the mean of `r_w`.

    Each process sees the table of all processes' pairs, and a checkpoint holds what was seen, so
    a run that is resumed, however often, tells what it would have told otherwise. Only a step that
    is done again, since its checkpoint was never written, can tell again.
    """

    def __init__(self) -> None:
        self._told = False
        self._seen: list[tuple[float, float, float]] = []

    def see(self, step: int, table: StepTable) -> str | None:
        """Takes a step in; returns the warning when it is due, else None.

        Args:
            step: Finished optimizer steps.
            table: The step's.
        """
        if self._told:
            return None
        columns = (table[name] for name in ("error_winner", "error_loser", "reference_winner"))
        # Exact sums, which do not depend on how pairs are spread over processes.
        winner, loser, known = (math.fsum(c.tolist()) / len(c) for c in columns)
        self._seen.append((winner, loser, known))
        if len(self._seen) < STEPS:
            return None
        winners, losers, references = zip(*self._seen, strict=True)
        self._seen.clear()
        grown, moved, known = (math.fsum(c) / STEPS for c in (winners, losers, references))
        spread = math.sqrt(math.fsum((w - grown) ** 2 for w in winners) / (STEPS - 1) / STEPS)
        if not grown > max(SURE * spread, NOTABLE * known):
            return None
        self._told = True
        return (
            f"step {step}: the winners' own error has grown, by {grown:.2g} over the reference's "
            f"{known:.2g} in the last {STEPS} steps, and {_losers(grown, moved)}"
        )

    def begin_round(self, before: WinnerWatch) -> None:
        """Goes on from the watch of the round before: with what was told, not with its steps."""
        self._told = before._told

    def state_dict(self) -> dict[str, Tensor]:
        """Returns whether it has told, and the steps it is looking at, for a checkpoint."""
        numbers = [float(self._told), *(number for step in self._seen for number in step)]
        return {NAME: torch.tensor(numbers, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores them; entries of other names are left alone."""
        if NAME in state:
            told, *numbers = state[NAME].tolist()
            self._told = bool(told)
            self._seen = list(zip(*[iter(numbers)] * 3, strict=True))


def _losers(winner: float, loser: float) -> str:
    """How the losers' error moved beside the winners', and what to do."""
    if loser > winner:
        return (
            f"the losers' more, by {loser:.2g}: margins are won by making both worse. Images may "
            "get worse: a lower slope or rate helps, and so does sdpo"
        )
    how = f"less, by {loser:.2g}" if loser > 0 else f"not ({loser:.2g})"
    return (
        f"the losers' {how}: losers are preferred now. Images may get worse: lower the rate, and "
        "look whether labels are the wrong way round"
    )


def make_watch(config: TrainConfig) -> WinnerWatch | None:
    """Returns the watch, or None without a reference: an error says nothing by itself."""
    return WinnerWatch() if config.needs_reference else None
