"""The ledger: every pair's own past margins, and the minority metric they give.

Each time a pair is visited, the margin `d = (r_w - r_l) - (e_w - e_l)` is a by-product of the loss.
Divided by the root mean square of the step's margins (so that timesteps and the training's progress
are put on one scale) it is one vote on the pair's label. With n earlier votes of mean m,

    u = 1 - sigmoid(2 m sqrt(n))        in [0, 1]; u > 1/2 exactly when m < 0

is the probability-like minority metric handed to `fastpo.loss.adaptive_dpo(minority=...)`. A visit
is judged by earlier visits only; pairs with fewer than `min_visits` of them get u = 0, the neutral
value. A margin of exactly zero is no vote: before the first update policy and reference agree to
the bit, and a gate would take that for doubt. It costs no forward pass, and eight bytes a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PairLedger:
    """Votes of every pair on its own label.

    Args:
        num_pairs: Number of pairs; slots are `0..num_pairs-1`.
        min_visits: Earlier visits a pair needs before it is judged.
        device: Where the two vectors live; 8 bytes a pair.

    Attributes:
        visits: `(num_pairs,)` int32, visits that gave a vote.
        total: `(num_pairs,)` float32, sum of the votes.

    Raises:
        ValueError: A count is not positive.

    Example:
        >>> ledger = PairLedger(2)
        >>> ledger.update(torch.tensor([0, 1]), torch.tensor([3e-4, -3e-4]))
        >>> ledger.minority(torch.tensor([0, 1])) > 0.5
        tensor([False,  True])
    """

    def __init__(
        self, num_pairs: int, *, min_visits: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        if num_pairs < 1 or min_visits < 1:
            raise ValueError(
                f"num_pairs and min_visits must be positive, got {num_pairs} and {min_visits}"
            )
        self.min_visits = min_visits
        self.visits = torch.zeros(num_pairs, dtype=torch.int32, device=device)
        self.total = torch.zeros(num_pairs, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return self.visits.shape[0]

    @torch.no_grad()
    def update(self, index: Tensor, margin: Tensor) -> None:
        """Records one vote for each pair of a step.

        All pairs of an optimiser step belong into one call, whatever their number of micro-batches
        and processes: the scale is taken over the call.

        Args:
            index: `(N,)` int64 slots; a slot may occur more than once.
            margin: `(N,)` the detached margins of these pairs.

        Raises:
            ValueError: The two vectors differ in length.
        """
        if index.shape != margin.shape or index.ndim != 1:
            raise ValueError(
                f"index and margin must be vectors of one length, got {tuple(index.shape)} "
                f"and {tuple(margin.shape)}"
            )
        margin = margin.to(torch.float64)
        scale = margin.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        vote = (margin / scale).to(self.total.dtype)
        self.total.index_add_(0, index, vote)
        self.visits.index_add_(0, index, (vote != 0).to(self.visits.dtype))

    def mean(self, index: Tensor | None = None) -> Tensor:
        """Returns `(N,)` float32: the mean vote, 0 for a pair without one."""
        visits, total = self._rows(index)
        return total / visits.clamp_min(1)

    def minority(self, index: Tensor | None = None) -> Tensor:
        """Returns `(N,)` float32: the minority metric u of some pairs, or of all."""
        visits, total = self._rows(index)
        root = visits.clamp_min(1).sqrt()
        u = torch.sigmoid(-2.0 * total / root)
        return torch.where(visits >= self.min_visits, u, torch.zeros_like(u))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the two vectors, for a checkpoint."""
        return {"visits": self.visits, "total": self.total}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the two vectors.

        Raises:
            ValueError: The state is of another number of pairs.
        """
        if state["visits"].shape != self.visits.shape:
            raise ValueError(
                f"the ledger holds {len(self)} pairs, the saved one {state['visits'].shape[0]}"
            )
        self.visits.copy_(state["visits"])
        self.total.copy_(state["total"])

    def _rows(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        visits, total = self.visits, self.total
        if index is not None:
            visits, total = visits[index], total[index]
        return visits.to(torch.float32), total
