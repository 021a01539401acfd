"""The ledger: every pair's own past margins, and the minority metric they give.

Each time a pair is visited, the margin `d = (r_w - r_l) - (e_w - e_l)` is a by-product of the loss.
How large margins are, and how much they tell, differs by orders of magnitude between timesteps,
prediction types and stages of training, and now and then one of them explodes. So the ledger keeps,
by timestep bin, running moments of the margins of all pairs, and puts every margin on one scale
before it counts:

    y = d / exp(mean_b(log |d|) + 0.635)    unit rms if margins are normal; one outlier hardly moves
                                            the mean logarithm, and so the scale
    z = y / sqrt(1 + (y / 2)^2) / (1 + (y / 100)^2)
                                            no margin counts more than those of about two scales,
                                            and one of more than a hundred says nothing
    x = z / rms_b(z)                        unit scale, whatever the timestep and the model predicts
    s = mean_b(x), at least 0               how far this bin's margins follow the labels at all
    vote = x s / (1 - s^2)                  half the log-likelihood ratio of `label right` over
                                            `wrong`, if x is normal with mean +s or -s and variance
                                            1 - s^2

With the sum of a pair's votes, the probability that its label is wrong, right and wrong being as
likely before, is

    u = sigmoid(-2 sum of votes)     in [0, 1]; u > 1/2 exactly where the votes' sum is negative

the minority metric handed to `fastpo.loss.adaptive_dpo(minority=...)`. Where a share f of labels is
wrong, s is (1 - 2f) of what right labels would give, so u errs on the cautious side.

A visit is judged by earlier visits only; pairs with fewer than `min_visits` votes get u = 0, the
neutral value. A vote of exactly zero is none: before the first update policy and reference agree to
the bit, and a gate would take that for doubt. Where labels are wrong more often than right, s is 0
and no pair gets a vote.

It costs no forward pass and eight bytes a pair. The choice of the scale and the constants is
measured in `benchmarks/results/cpu/ledger.md`: dividing by the step's rms leaves only the sign
in steps of one pair, and lets loud timesteps drown the telling ones; dividing by the bin's rms lets
one outlier silence it for hundreds of margins.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

BINS = 10  # of the schedule's timesteps, equally wide
WINDOW = 256.0  # margins after which a bin's older moments weigh 1/e
PRIOR = 32.0  # margins of evidence with which a bin starts out at the overall mean
DOUBT = 32.0  # margins of evidence with which the overall mean starts out at zero
LEVEL = 2.0  # y at which a margin begins to count no more than smaller ones
ABSURD = 100.0  # y from which on it counts for nothing
CERTAIN = 0.9  # largest s: no single vote decides alone
NORMAL = (0.5772156649015329 + math.log(2.0)) / 2.0  # -E log |y| of a standard normal y


class PairLedger:
    """Votes of every pair on its own label.

    Args:
        num_pairs: Number of pairs; slots are `0..num_pairs-1`.
        min_visits: Earlier votes a pair needs before its metric counts.
        num_timesteps: Length T of the noise schedule.
        device: Where the vectors live; 8 bytes a pair. A lookup or update costs the same for ten
            pairs as for ten million.

    Attributes:
        visits: `(num_pairs,)` int32, visits that gave a vote.
        total: `(num_pairs,)` float32, sum of the votes.
        moments: `(4, BINS)` float64 by timestep bin: count of the margins so far, sums of
            log |d|, of z and of z^2, the older ones fading.

    Raises:
        ValueError: A count is not positive.

    Example:
        >>> ledger = PairLedger(4)
        >>> ledger.update(torch.arange(4), torch.tensor([3e-4, -3e-4, 2e-4, 4e-4]))
        >>> ledger.minority() > 0.5
        tensor([False,  True, False, False])
    """

    def __init__(
        self,
        num_pairs: int,
        *,
        min_visits: int = 1,
        num_timesteps: int = 1000,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(num_pairs, min_visits, num_timesteps) < 1:
            raise ValueError(
                "num_pairs, min_visits and num_timesteps must be positive, got "
                f"{num_pairs}, {min_visits} and {num_timesteps}"
            )
        self.min_visits = min_visits
        self.num_timesteps = num_timesteps
        self.visits = torch.zeros(num_pairs, dtype=torch.int32, device=device)
        self.total = torch.zeros(num_pairs, dtype=torch.float32, device=device)
        self.moments = torch.zeros(4, BINS, dtype=torch.float64, device=device)
        self._recorded: list[Tensor] = []

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return self.visits.shape[0]

    @torch.no_grad()
    def update(self, index: Tensor, margin: Tensor, timestep: Tensor | None = None) -> None:
        """Enters one vote for each pair of an optimizer step.

        All pairs of the step belong into one call, whatever their number of micro-batches and
        processes: the result is then the same to the bit however they were spread. `record` and
        `merge` see to that in a loop that does not gather them anyway.

        Args:
            index: `(N,)` int64 slots; a slot may occur more than once.
            margin: `(N,)` these pairs' margins, any float dtype; one that is not finite is no vote.
            timestep: `(N,)` the timesteps they were measured at, in [0, T); None takes all margins
                as measured at the same.

        Raises:
            ValueError: The vectors differ in length, or a slot or timestep lies out of range; the
                ledger is then as it was.
        """
        timestep = torch.zeros_like(index) if timestep is None else timestep
        _check_vectors(index, margin, timestep)
        if not len(index):
            return
        index, timestep = (v.to(self.total.device, torch.int64) for v in (index, timestep))
        margin = margin.to(self.total.device, torch.float64)
        _check_range("slots", index, len(self))
        _check_range("timesteps", timestep, self.num_timesteps)
        # One order whatever the arrival, so that the sums round alike.
        order = margin.argsort(stable=True)
        order = order[index[order].argsort(stable=True)]
        index, margin, timestep = index[order], margin[order], timestep[order]
        vote = self._votes(margin.where(margin.isfinite(), 0.0), timestep).to(self.total.dtype)
        self.total.index_add_(0, index, vote)
        self.visits.index_add_(0, index, (vote != 0).to(self.visits.dtype))

    def _votes(self, margin: Tensor, timestep: Tensor) -> Tensor:
        """Moves the moments on by one step's margins, and weighs these by them."""
        bins = self.bins(timestep)
        seen = margin != 0
        sizes = margin.abs().where(seen, 1.0).log()
        added = torch.zeros_like(self.moments)
        added[:2].index_add_(1, bins, torch.stack([seen.to(sizes.dtype), sizes]))
        self.moments.mul_(torch.exp(-added[0] / WINDOW)).add_(added)
        count = self.moments[0].clamp_min(1e-9)
        y = (margin / torch.exp(self.moments[1] / count + NORMAL)[bins]).clamp(-1e9, 1e9)
        z = y / (1.0 + (y / LEVEL).square()).sqrt() / (1.0 + (y / ABSURD).square())
        self.moments[2:].index_add_(1, bins, torch.stack([z, z.square()]))
        count, _, total, power = self.moments
        rms = (power / count.clamp_min(1e-9)).sqrt().clamp_min(torch.finfo(power.dtype).tiny)
        follows = total / rms  # sum of x
        overall = follows.sum() / (count.sum() + DOUBT)
        s = ((follows + PRIOR * overall) / (count + PRIOR)).clamp(0.0, CERTAIN)
        return z * (s / (1.0 - s.square()) / rms)[bins]

    def bin_sizes(self) -> Tensor:
        """How large margins are in each timestep bin, `(BINS,)` float32, relative to all of them.

        `exp(mean_b(log |d|) - mean(log |d|))`, the mean of a bin with few margins drawn towards
        that of all; 1 before there are any.
        """
        count, sums = self.moments[:2]
        overall = sums.sum() / count.sum().clamp_min(1e-9)
        logs = (sums + PRIOR * overall) / (count + PRIOR)
        return torch.exp(logs - overall).float()

    def bins(self, timestep: Tensor) -> Tensor:
        """The bins of timesteps in [0, T), int64, on their device."""
        return timestep.long() * BINS // self.num_timesteps

    def record(self, index: Tensor, margin: Tensor, timestep: Tensor | None = None) -> None:
        """Keeps one micro-batch's margins until `merge`; arguments as in `update`.

        Nothing is read from the device here, so a timestep or slot out of range is found by
        `merge`.

        Raises:
            ValueError: The vectors differ in length.
        """
        timestep = torch.zeros_like(index) if timestep is None else timestep
        _check_vectors(index, margin, timestep)
        rows = [v.detach().to(margin.device, torch.float64) for v in (index, margin, timestep)]
        self._recorded.append(torch.stack(rows, dim=1))

    def merge(self, group: dist.ProcessGroup | None = None) -> None:
        """Enters what was recorded since the last merge, by all processes of a running group.

        `torch.distributed` carries 24 bytes per recorded pair; every process must call it equally
        often, also one that recorded nothing. Best once per optimizer step: beside the gradients of
        even a small adapter that is nothing. Called more rarely, the votes since the last merge are
        entered as one step's; until then a pair is judged without them, which matters little where
        it comes back once an epoch. The trainer gathers its table of metrics once a step and
        updates from that, so it has no use for an interval.

        Args:
            group: The processes that share the ledger; None takes all.

        Raises:
            ValueError: A recorded slot or timestep lies out of range, on any process; nothing is
                entered, and what was recorded is dropped.
        """
        rows = torch.zeros(0, 3, dtype=torch.float64)
        if self._recorded:
            rows = torch.cat(self._recorded).cpu()
        if dist.is_available() and dist.is_initialized():
            parts: list[Tensor] = [rows] * dist.get_world_size(group)
            dist.all_gather_object(parts, rows, group=group)
            rows = torch.cat(parts)
        self._recorded.clear()
        self.update(rows[:, 0].long(), rows[:, 1], rows[:, 2].long())

    def mean(self, index: Tensor | None = None) -> Tensor:
        """Returns `(N,)` float32 on the ledger's device: the mean vote, 0 for a pair without one.

        Args:
            index: `(N,)` int64 slots on any device; None takes all pairs.
        """
        visits, total = self._rows(index)
        return total / visits.clamp_min(1)

    def minority(self, index: Tensor | None = None) -> Tensor:
        """Returns `(N,)` float32 on the ledger's device: the minority metric u.

        Args:
            index: `(N,)` int64 slots on any device; None takes all pairs.
        """
        visits, total = self._rows(index)
        u = torch.sigmoid(-2.0 * total)
        return torch.where(visits >= self.min_visits, u, torch.zeros_like(u))

    def begin_round(self, keep: float) -> None:
        """Keeps a share of every pair's votes, for a model that begins anew from the base.

        The moments are forgotten: the new model's margins begin small.

        Args:
            keep: Factor of the sums of votes, in [0, 1]; at 0 every pair is open again, as one
                that was never judged.
        """
        self.total.mul_(keep)
        if keep == 0.0:  # votes that sum to 0 are a doubt of one half, which closes a gate
            self.visits.zero_()
        self.moments.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the ledger's tensors, for a checkpoint.

        Raises:
            RuntimeError: Recorded margins wait for `merge`.
        """
        if self._recorded:
            raise RuntimeError("the ledger holds recorded margins; call merge() before saving")
        return {"visits": self.visits, "total": self.total, "moments": self.moments}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the tensors.

        Raises:
            ValueError: The state is of another number of pairs or bins, or of an older kind.
        """
        if "moments" not in state or state["moments"].shape != self.moments.shape:
            raise ValueError(
                "the saved ledger keeps its votes on another scale than this version of FastPO; go "
                "on with the version that began"
            )
        if state["visits"].shape != self.visits.shape:
            raise ValueError(
                f"the ledger holds {len(self)} pairs, the saved one {state['visits'].shape[0]}"
            )
        self._recorded.clear()
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def _rows(self, index: Tensor | None) -> tuple[Tensor, Tensor]:
        visits, total = self.visits, self.total
        if index is not None:
            index = index.to(total.device)
            visits, total = visits[index], total[index]
        return visits, total


def _check_vectors(index: Tensor, margin: Tensor, timestep: Tensor) -> None:
    if index.ndim != 1 or not index.shape == margin.shape == timestep.shape:
        raise ValueError(
            "index, margin and timestep must be vectors of one length, got "
            f"{tuple(index.shape)}, {tuple(margin.shape)} and {tuple(timestep.shape)}"
        )


def _check_range(what: str, values: Tensor, stop: int) -> None:
    low, high = values.min().item(), values.max().item()
    if low < 0 or high >= stop:
        raise ValueError(f"{what} must lie in [0, {stop}), got {low} to {high}")
