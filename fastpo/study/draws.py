"""Would a pair be judged better by several timesteps and noises a visit, at equal forward passes?

    python -m fastpo.study.draws --work FOLDER [--flips 0.2 0.4] [--seeds 0]

Plain DPO on the digits, as `fastpo/study/ledger.py` trains it. Before each step its pairs get
further draws without gradients, whose margins a ledger may count as votes beside the step's own. A
visit costs four passes through the denoiser (policy forward and backward, reference), a further
draw two, or with the reference's errors cached three and one. The rows go into `ledger.csv`, the
table is part of `ledger.md` (`python -m fastpo.study.replay`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastpo.bench.script import results_path
from fastpo.demo.base import SHORT as SHORT_BASE
from fastpo.demo.base import build_base
from fastpo.errors import DataError
from fastpo.ledger import PairLedger
from fastpo.study.ledger import ROWS, ROWS_SHORT, Place, Results
from fastpo.study.measure import area, minority_columns
from fastpo.study.own_steps import train_with
from fastpo.system.words import counted
from fastpo.train.metrics import StepResult, StepTable
from fastpo.train.trainer import Trainer
from fastpo.types import PairBatch

MORE = 3
"""Further draws that are recorded."""
FAR = 1_000
"""A pair's visits in training have lower numbers; those of further draws are beyond."""
VISIT, DRAW = (4, 2), (3, 1)
"""Passes of a visit and of a further draw: with a live reference, with a cached one."""


@dataclass(frozen=True)
class DrawingTrainer(Trainer):
    """Judges a step's pairs by further draws before the step.

    Attributes:
        drawn: For each step `(1 + more, 3, N)` float64: by draw, the pairs, their timesteps and
            margins, those of the step first.
        more: How many draws more.
    """

    drawn: list[np.ndarray]
    more: int

    def optimizer_step(
        self,
        batches: Iterator[PairBatch],
        step: int,
        must_end: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """See `Trainer`."""
        window = [next(batches) for _ in range(self.config.accumulation_steps)]
        draws = [
            np.concatenate([self._look(batch, draw, step) for batch in window], axis=1)
            for draw in range(1 + self.more)
        ]
        self.drawn.append(np.stack(draws))
        return super().optimizer_step(iter(window), step, must_end)

    def record(self, table: StepTable) -> None:
        """Takes the step's own margins as its first draw; see `Trainer`."""
        super().record(table)
        rows = torch.stack([table["index"], table["timestep"], table.votes])
        assert np.array_equal(self.drawn[-1][0, 0], rows[0].numpy()), "one order of the pairs"
        self.drawn[-1][0] = rows.numpy()
        if not table.moved:  # policy and reference still agree
            self.drawn[-1][1:, 2] = 0.0

    @torch.no_grad()
    def _look(self, batch: PairBatch, draw: int, step: int) -> np.ndarray:
        """Pairs, timesteps and margins, `(3, B)`; of draw 0, which the step makes, the pairs."""
        if draw == 0:
            return torch.stack([batch.index.double()] * 3).numpy()
        judged = self.judged(replace(batch, visit=batch.visit + FAR * draw), step)
        with self.processes.autocast():
            policy = self.denoisers.predict(
                self.denoisers.policy, judged.noised, judged.batch.conditions
            )
        margin = self.pair_loss(judged, policy).margin
        columns: list[Tensor] = [batch.index, judged.noised.index, margin]
        return torch.stack([column.double().cpu() for column in columns]).numpy()


def doubt(drawn: Sequence[np.ndarray], pairs: int, draws: int, visits: int) -> np.ndarray:
    """Each pair's doubt after some visits, if so many draws of a visit vote together.

    Args:
        drawn: As `DrawingTrainer.drawn`.
        pairs: How many there are.
        draws: How many of a visit's draws count.
        visits: Visits of every pair; later ones are left out.

    Returns:
        `(pairs,)` float64, minus the sum of votes.
    """
    ledger, seen = PairLedger(pairs), np.zeros(pairs, dtype=np.int64)
    for step in drawn:
        index = step[0, 0].astype(np.int64)
        counts = seen[index] < visits
        seen[index] += 1
        slot, timestep, margin = step[:draws, :, counts].transpose(1, 0, 2).reshape(3, -1)
        ledger.update(
            torch.from_numpy(slot).long(),
            torch.from_numpy(margin),
            torch.from_numpy(timestep).long(),
        )
    return -ledger.total.double().numpy()


def passes(draws: int, visits: int, costs: tuple[int, int]) -> int:
    """Passes through the denoiser for each pair."""
    visit, draw = costs
    return visits * (visit + draw * (draws - 1))


def run(place: Place, flip_rate: float, seed: int, results: Results) -> None:
    """Trains once and replays all numbers of draws, unless their rows are there."""
    labels: Mapping[str, object] = {"part": "draws", "flip_rate": flip_rate, "seed": seed}
    if results.has(**labels):
        return
    work = place.work(f"seed-{seed}", seed=seed)
    config = place.configure(work, "draws", {}, flip_rate=flip_rate, seed=seed)
    drawn: list[np.ndarray] = []
    folder = train_with(
        config, lambda run: DrawingTrainer(**vars(run.trainer), drawn=drawn, more=MORE)
    )
    if not drawn:
        raise DataError(f"{folder} is finished and its draws are lost: remove it")
    names, flipped, _ = minority_columns(folder)
    for draws in range(1, 2 + MORE):
        for visits in range(1, 1 + int(config.train.epochs or 1)):
            results.add(
                **labels,
                case=f"{visits} visits",
                method=f"{draws} draws",
                pairs=len(names),
                wrong=float(flipped.mean()),
                auroc=area(flipped, doubt(drawn, len(names), draws, visits)),
            )


def draws_table(results: Results) -> str:
    """AUROC by draws a visit and by visits, and the passes that each took; empty without rows."""
    rows = [row for row in results.rows if row["part"] == "draws"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = []
    for rate, seed in dict.fromkeys((row["flip_rate"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["flip_rate"], row["seed"]) == (rate, seed)]
        for method in dict.fromkeys(row["method"] for row in own):
            found = {row["case"]: row["auroc"] for row in own if row["method"] == method}
            draws = int(method.split()[0])
            cells = []
            for case, auroc in found.items():
                costs = [passes(draws, int(case.split()[0]), c) for c in (VISIT, DRAW)]
                cells.append(f"{float(auroc):.3f} ({costs[0]}, {costs[1]})")
            lines.append("| " + " | ".join([f"{float(rate):.0%}", seed, str(draws), *cells]) + " |")
    if not lines:
        return ""
    after = [counted(int(case.split()[0]), "visit") for case in cases]
    head = ["flipped", "seed", "draws a visit", *(f"AUROC after {visits}" for visits in after)]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def main() -> None:
    """Makes what the CSV lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for base, data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--flips", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--short", action="store_true", help="try every step, measure nothing")
    parser.add_argument("--out", type=Path, help="CSV file; default: results/<device>/ledger.csv")
    options = parser.parse_args()
    root = options.work / "short" if options.short else options.work
    results = Results(options.out or results_path("ledger"))
    base = build_base(root / "base", recipe=SHORT_BASE if options.short else None)
    place = Place(base, root, ROWS_SHORT if options.short else ROWS, options.short)
    for seed in options.seeds:
        for rate in options.flips:
            run(place, rate, seed, results)


if __name__ == "__main__":
    main()
