"""What a step tells of every pair: one table, brought to the host at once, and its metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.loss import PairLoss
from fastpo.train.slope import Slope
from fastpo.types import PairBatch

COLUMNS = (
    "index",
    "timestep",
    "loss",
    "margin",
    "error_winner",
    "error_loser",
    "reference_winner",
    "minority",
    "weight",
    "logit",
    "scale",
    "closed",
    "kept",
)
"""`error_winner` and `error_loser` are the errors over the reference's, whose own on winners is
`reference_winner`; without a reference they are the errors, and it is NaN. `logit` is the size of a
logit other than beta d, NaN elsewhere; see `fastpo.train.logits`. The last three are those of
`train.backward`, NaN where it is `all`; see `SparseColumns`."""
TIMES = ("pairs_per_second", "data/wait")
"""Metrics that differ between equal runs."""

ENDING = -2.0
SATURATED = 4.0  # logit from which on a pair's gradient is below 4 % of a fresh one's


class StepCost(NamedTuple):
    """What a step with `train.backward` took, and would have taken; alike on all processes.

    Rows are counted as the processes wait for one another: of each pass, those of the process with
    the most, rows that only keep it in step included; then divided by the window's pairs, counted
    likewise.

    Attributes:
        passes: Passes through the policy a pair: 1 forward, 2 backward (3 with gradient
            checkpointing).
        share: The share of the pairs in a second pass, where all are looked at first.
    """

    passes: float
    share: float


@dataclass(frozen=True)
class StepTable:
    """One row per pair of an optimizer step, on the host.

    Attributes:
        rows: `(N, K)` float64 by `COLUMNS`, without padding.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: The rate this step used.
        moved: Whether an earlier update has changed the weights.
        ending: Whether a signal has asked one of several processes to end.
        slope: The beta of the logit z = beta d, or None where the loss has no logit.
        cost: The passes of `train.backward`, None where it is `all`.
    """

    rows: Tensor
    grad_norm: float
    learning_rate: float
    moved: bool
    ending: bool = False
    slope: Slope | None = None
    cost: StepCost | None = None

    def __getitem__(self, column: str) -> Tensor:
        """Returns one column, `(N,)` float64."""
        return self.rows[:, COLUMNS.index(column)]

    @property
    def index(self) -> Tensor:
        """The pairs' positions in the cache, `(N,)` int64."""
        return self["index"].long()

    @property
    def votes(self) -> Tensor:
        """The margins as the ledger counts them, `(N,)` float64.

        Before the weights have moved, policy and reference agree. What a margin then holds is the
        rounding of cached errors or of compiled code, and must not count as a vote.
        """
        margin = self["margin"]
        return margin if self.moved else torch.zeros_like(margin)

    def non_finite(self) -> list[int]:
        """Returns the positions of the pairs in micro-batches whose loss is NaN or infinite."""
        return self.index[~torch.isfinite(self["loss"])].tolist()

    def metrics(
        self, *, step: int, epoch: float, seconds: float, waited: float = 0.0
    ) -> dict[str, float]:
        """Returns the line of `metrics.jsonl`; keys whose column was not computed are left out.

        Args:
            step: Finished optimizer steps.
            epoch: Finished epochs.
            seconds: What the step took.
            waited: How much of that it waited for data; `data/wait` is the share.
        """
        margin = self["margin"]
        metrics = {
            "step": step,
            "epoch": round(epoch, 6),
            "loss": self["loss"].mean().item(),
            "rewards/margins": margin.mean().item(),
            "rewards/accuracies": (margin > 0).double().mean().item(),
            "error/winner": self["error_winner"].mean().item(),
            "error/loser": self["error_loser"].mean().item(),
            "lr": self.learning_rate,
            "grad_norm": self.grad_norm,
            "pairs_per_second": len(margin) / seconds,
            "data/wait": waited / seconds,
        }
        logit = self["logit"]
        if self.slope is not None:
            metrics["slope"] = self.slope.value
            logit = self.slope.at(self["timestep"]) * margin.abs()
        if self.slope is not None or not logit.isnan().all():
            metrics["rewards/saturated"] = (logit > SATURATED).double().mean().item()
        minority, weight = self["minority"], self["weight"]
        if not minority.isnan().any():
            for q in (0.1, 0.5, 0.9):
                metrics[f"minority/q{round(100 * q)}"] = minority.quantile(q).item()
        if not weight.isnan().any():
            metrics["weight/mean"] = weight.mean().item()
        return metrics | self._passes()

    def _passes(self) -> dict[str, float]:
        """What `train.backward` has saved; nothing where it is `all`."""
        kept = self["kept"]
        if self.cost is None:
            return {}
        weights = (self["scale"] * kept).nan_to_num()
        power = weights.square().sum()
        return {
            "backward/share": (kept > 0).double().mean().item(),
            "backward/closed": self["closed"].mean().item(),
            "backward/effective": (weights.sum().square() / power).item() if power > 0 else 0.0,
            "backward/cost": self.cost.passes,
        }


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step leaves on the device; the step's one wait is `read`.

    Attributes:
        rows: `(M, K)` float64 by `COLUMNS`, of all processes; padding has the index -1, and the
            row that a process which must end adds to its own the index `ENDING`.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: The rate this step used.
        moved: Whether an earlier update has changed the weights.
        slope: The beta of the logit, or None.
        cost: The passes of `train.backward`, or None.
    """

    rows: Tensor
    grad_norm: Tensor | float
    learning_rate: float
    moved: bool
    slope: Slope | None = None
    cost: StepCost | None = None

    def read(self) -> StepTable:
        """Brings the rows and the gradient norm to the host."""
        rows = self.rows
        norm = torch.as_tensor(self.grad_norm, dtype=rows.dtype, device=rows.device)
        host = torch.cat((rows, norm.expand(1, rows.shape[1]))).cpu()
        rows, norm = host[:-1], host[-1, 0]
        ending = bool((rows[:, 0].numpy() == ENDING).any())
        pairs = rows[rows[:, 0] >= 0]
        about = (self.learning_rate, self.moved, ending, self.slope, self.cost)
        return StepTable(pairs, norm.item(), *about)


def with_ending(rows: Tensor, ending: bool) -> Tensor:
    """Adds a row to one of several processes' table: whether a signal asks it to end."""
    return torch.nn.functional.pad(rows, (0, 0, 0, 1), value=ENDING if ending else -1.0)


class SparseColumns(NamedTuple):
    """What became of B pairs' backward passes, each `(B,)`.

    Attributes:
        scale: Gradient scale.
        closed: Whether the ledger had closed the pair's gate before the forward pass.
        kept: Weight of the backward pass, 0 where there was none.
    """

    scale: Tensor
    closed: Tensor
    kept: Tensor


def table_rows(
    batch: PairBatch,
    timesteps: Tensor,
    out: PairLoss,
    size: int,
    logits: Tensor | None = None,
    sparse: SparseColumns | None = None,
) -> Tensor:
    """One row of `COLUMNS` per pair, padded with index -1 to `size` rows; stays on the device.

    Args:
        batch: B pairs, on the device.
        timesteps: `(B,)`, their places in the noise schedule.
        out: Their loss.
        size: Rows of the result.
        logits: `(B,)`, sizes of logits other than beta d, or None.
        sparse: With `train.backward`, its columns.
    """
    pairs = len(batch)
    error, known = out.policy_error.detach().double(), out.reference_error
    if known is not None:
        error = error - known
    nothing = torch.full((pairs,), math.nan, dtype=torch.float64, device=error.device)
    columns = {
        "index": batch.index,
        "timestep": timesteps,
        "loss": out.loss.detach().expand(pairs),
        "margin": out.margin.detach(),
        "error_winner": error[:pairs],
        "error_loser": error[pairs:],
        "reference_winner": nothing if known is None else known[:pairs],
        "minority": nothing if out.minority is None else out.minority,
        "weight": nothing if out.weight is None else out.weight,
        "logit": nothing if logits is None else logits,
    }
    if sparse is not None:
        columns |= sparse._asdict()
    stay = [columns.get(name, nothing).to(error.device).double() for name in COLUMNS]
    rows = torch.stack(stay, dim=1)
    return torch.nn.functional.pad(rows, (0, 0, 0, size - pairs), value=-1.0)
