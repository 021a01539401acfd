"""How many rows a second pass has had of late: decides how `train.backward` makes its steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastpo.config import TrainConfig
from fastpo.train.metrics import StepTable

FADING = 0.9  # weight of the older share after each step: about ten steps count
NAME = "live_share"


def passes_at_once(checkpointing: object) -> float:
    """What a pair costs that is differentiated in its one forward pass.

    Args:
        checkpointing: `train.gradient_checkpointing`; anything but false repeats the forward pass.
    """
    return 4.0 if checkpointing else 3.0


class LiveShare:
    """Running share s of a step's pairs in its second pass, where all are looked at first.

    A forward pass costs 1 a pair, a backward pass 2. To differentiate all of them costs 3; to look
    first, without gradients, and then to differentiate a share s in a second pass costs 1 + 3 s.
    With gradient checkpointing, whose backward pass repeats the forward pass, these are 4 and
    1 + 4 s. So looking first pays below s = 2/3 and 3/4.

    The share is that of the process with the most rows, for which the others wait (see `StepCost`):
    above the mean over processes, and near 1 where a step has one pair a process. It is counted in
    steps that do not look first too, from what they draw. It is saved, so all processes, and a
    resumed run, decide alike.

    Args:
        config: The run.

    Attributes:
        value: The share, 1 before the first step.
        known: Whether a step, of this run or of the checkpoint's, has had a part in it.
        dense: What a pair costs that is differentiated at once.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.value, self.known = 1.0, False
        self.dense = passes_at_once(config.gradient_checkpointing)
        self._threshold = config.backward_threshold if config.backward == "sampled" else None

    @property
    def looking(self) -> float:
        """What a step that looks first is expected to cost a pair."""
        return 1.0 + self.dense * self.value

    def chance(self, scale: Tensor) -> Tensor:
        """The probability of a pair's backward pass, from its gradient scale; 1 where it is NaN."""
        if self._threshold is None:
            return (scale != 0).to(scale.dtype)
        return (scale / self._threshold).clamp(max=1.0).nan_to_num(1.0)

    def update(self, table: StepTable) -> None:
        """Moves the share on by one step."""
        assert table.cost is not None, "a step with train.backward counts its passes"
        self.value = FADING * self.value + (1.0 - FADING) * table.cost.share
        self.known = True

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the share, for a checkpoint; nothing before the first step."""
        return {} if not self.known else {NAME: torch.tensor([self.value], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the share; entries of other names are left alone."""
        if NAME in state:
            self.value, self.known = state[NAME].item(), True
