"""What a run's folder tells of each pair's label: votes, margins by timestep, trend, history."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from fastpo.config import Config, load_config
from fastpo.errors import DataError, one_line
from fastpo.ledger import BINS, PairLedger
from fastpo.review.calibration import Array, Calibration, calibrate
from fastpo.system.files import whole_file

MINORITY, VOTES, CONFIG = "minority.csv", "votes.csv", "config.yaml"
VOTE_TYPES = {
    **{name: pa.int64() for name in ("step", "round", "pair", "timestep", "bin", "turned")},
    "margin": pa.float64(),
}


@dataclass(frozen=True)
class Votes:
    """Each vote of a run, in order, `(V,)`; of a run that kept none, empty.

    Attributes:
        pair: Its pair.
        bin: Its timestep bin.
        margin: The margin that was counted.
        vote: What the ledger made of it.
        doubt: u of the pair after it, from all votes so far.
    """

    pair: NDArray[np.int64]
    bin: NDArray[np.int64]
    margin: Array
    vote: Array
    doubt: Array


@dataclass(frozen=True)
class Verdicts:
    """What a run's table of pairs says of its N labels.

    Attributes:
        pair_ids: The pairs' names.
        flipped: `(N,)` labels exchanged on purpose.
        visits: `(N,)` votes.
        mean_vote: `(N,)` their mean.
        minority: `(N,)` the ledger's metric u.
        moving: `(N,)` the metric of moving averages, NaN where there is none.
        probability: `(N,)` calibrated probability that the label is wrong.
        calibration: What it was learned as; None: it could not be learned, and it is u, and one
            half where there is no vote.
    """

    pair_ids: list[str]
    flipped: NDArray[np.bool_]
    visits: Array
    mean_vote: Array
    minority: Array
    moving: Array
    probability: Array
    calibration: Calibration | None

    @property
    def judged(self) -> NDArray[np.bool_]:
        """`(N,)` which pairs have votes; the others' probability is no verdict."""
        return self.visits > 0


@dataclass(frozen=True)
class Evidence(Verdicts):
    """All that a finished run says of its labels.

    Attributes:
        run: Its folder.
        config: Its configuration.
        votes: Each vote.
    """

    run: Path
    config: Config
    votes: Votes

    @property
    def knows_flips(self) -> bool:
        """Whether of the judged pairs some labels, not all, were exchanged on purpose."""
        flipped = self.flipped[self.judged]
        return bool(flipped.any() and not flipped.all())

    def margins(self) -> tuple[Array, NDArray[np.int64]]:
        """Returns each pair's mean margin by timestep bin, NaN without a visit, and the counts."""
        shape = (len(self.pair_ids), BINS)
        place = self.votes.pair * BINS + self.votes.bin
        counts = np.bincount(place, minlength=shape[0] * BINS)
        sums = np.bincount(place, self.votes.margin, shape[0] * BINS)
        means = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
        return means.reshape(shape), counts.reshape(shape)

    def trend(self) -> Array:
        """Returns by how much a pair's vote changes a visit, by least squares; NaN below two."""
        pair = self.votes.pair
        order = np.argsort(pair, kind="stable")
        number = np.empty(len(pair))
        sizes = np.bincount(pair, minlength=len(self.pair_ids))
        starts = np.cumsum(sizes) - sizes
        number[order] = np.arange(len(pair)) - starts[pair[order]]
        number -= (sizes[pair] - 1) / 2.0
        up = np.bincount(pair, number * self.votes.vote, len(sizes))
        spread = np.bincount(pair, number**2, len(sizes))
        return np.divide(up, spread, out=np.full(len(sizes), np.nan), where=spread > 0)

    def histories(self) -> tuple[NDArray[np.int64], Array]:
        """Returns u after each visit, pair after pair, and where each pair's begin, `(N + 1,)`."""
        order = np.argsort(self.votes.pair, kind="stable")
        sizes = np.bincount(self.votes.pair, minlength=len(self.pair_ids))
        return np.concatenate([[0], np.cumsum(sizes)]), self.votes.doubt[order]


def load_evidence(run: Path) -> Evidence:
    """Reads a finished run's folder, and learns the calibration.

    Raises:
        DataError: It is no finished run, or one of its files is damaged.
        ConfigError: `config.yaml` is not one.
    """
    verdicts = load_verdicts(run)
    if not (run / CONFIG).is_file():
        raise DataError(f"{run} is no run of FastPO: it has no {CONFIG}")
    config = load_config(run / CONFIG)
    votes = _replayed(run / VOTES, len(verdicts.pair_ids), config.train.rounds_carry)
    return Evidence(**vars(verdicts), run=run, config=config, votes=votes)


def load_verdicts(run: Path) -> Verdicts:
    """Reads a finished run's table of pairs, and learns the calibration.

    Raises:
        DataError: There is none, or it is damaged.
    """
    table = read_minority(run / MINORITY)
    visits, total = table["visits"], table["visits"] * table["ledger_mean"]
    found = calibrate(total, visits)
    u = np.where(visits > 0, table["ledger_minority"], 0.5)
    return Verdicts(
        pair_ids=table["pair_id"],
        flipped=table["flipped"] > 0,
        visits=visits,
        mean_vote=table["ledger_mean"],
        minority=table["ledger_minority"],
        moving=table["metric_minority"],
        probability=u if found is None else found.probability(total, visits),
        calibration=found,
    )


def read_minority(path: Path) -> dict[str, Any]:
    """Reads `minority.csv`: each numeric column as `(N,)` float64, and the pairs' names.

    Raises:
        DataError: There is none, or it is damaged.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; train first, to the end")
    names = ("flipped", "visits", "ledger_mean", "ledger_minority", "metric_minority")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        table: dict[str, Any] = {
            name: np.array([float(row[name] or "nan") for row in rows]) for name in names
        }
        table["pair_id"] = [str(row["pair_id"]) for row in rows]
        if not rows or not np.isfinite(np.stack([table[n] for n in names[:4]])).all():
            raise ValueError("a pair without visits or metric, or no pair at all")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {one_line(error)}") from None
    return table


def _replayed(path: Path, pairs: int, carry: float) -> Votes:
    """Reads the votes, and sees what the ledger made of each.

    Raises:
        DataError: The file is damaged.
    """
    if not path.is_file():
        nothing = np.zeros(0)
        whole = nothing.astype(np.int64)
        return Votes(whole, whole, nothing, nothing, nothing)
    try:
        types = pyarrow.csv.ConvertOptions(column_types=VOTE_TYPES)
        table = pyarrow.csv.read_csv(path, convert_options=types)
        columns = {name: table[name].to_numpy() for name in VOTE_TYPES}
        for name, stop in (("pair", pairs), ("bin", BINS)):
            if len(table) and not (0 <= columns[name].min() and columns[name].max() < stop):
                raise ValueError(f"a {name} lies outside of [0, {stop})")
        ledger = PairLedger(pairs, num_timesteps=BINS)
        vote, doubt = _replay(ledger, columns, carry)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged: {one_line(error)}") from None
    turned = columns["turned"] > 0  # what follows is about the label that the run was given
    margin = np.where(turned, -columns["margin"], columns["margin"])
    vote, doubt = np.where(turned, -vote, vote), np.where(turned, 1 - doubt, doubt)
    return Votes(columns["pair"], columns["bin"], margin, vote, doubt)


def _replay(ledger: PairLedger, columns: dict[str, Any], carry: float) -> tuple[Array, Array]:
    """Returns each vote, and u of its pair after it; `carry` is `train.rounds_carry`."""
    number, turned = columns["round"], torch.zeros(len(ledger), dtype=torch.bool)
    step, lines = columns["step"], len(columns["step"])
    vote, doubt = np.zeros(lines), np.zeros(lines)
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(step)) + 1, [lines]])
    # The loss's margins are float32; the file has digits enough for them.
    margin = columns["margin"].astype(np.float32)
    for start, stop in itertools.pairwise(cuts):
        if start and number[start] != number[start - 1]:
            ledger.begin_round(carry)
        pair, bins = (torch.from_numpy(columns[k][start:stop].copy()) for k in ("pair", "bin"))
        now = torch.from_numpy(columns["turned"][start:stop] > 0)
        other = turned[pair] != now
        ledger.total[pair[other]] *= -1.0
        turned[pair] = now
        before = ledger.total[pair]
        ledger.update(pair, torch.from_numpy(margin[start:stop].copy()), bins)
        after = ledger.total[pair]
        vote[start:stop] = (after - before).numpy()
        doubt[start:stop] = torch.sigmoid(-2.0 * after).numpy()
    return vote, doubt


def write_table(evidence: Evidence, path: Path) -> None:
    """Writes a row a pair as Parquet: metric, votes, margins by timestep bin, trend, history."""
    means, counts = evidence.margins()
    starts, doubts = evidence.histories()
    columns: dict[str, Any] = {
        "pair_id": evidence.pair_ids,
        "flipped": evidence.flipped,
        "visits": evidence.visits.astype(np.int32),
        "mean_vote": evidence.mean_vote,
        "ledger_minority": evidence.minority,
        "metric_minority": pa.array(evidence.moving, from_pandas=True),
        "probability": evidence.probability,
        "trend": pa.array(evidence.trend(), from_pandas=True),
    }
    for k in range(BINS):
        columns[f"margin_bin_{k}"] = pa.array(means[:, k], from_pandas=True)
        columns[f"visits_bin_{k}"] = counts[:, k].astype(np.int32)
    offsets = pa.array(starts, pa.int64())
    columns["history"] = pa.LargeListArray.from_arrays(offsets, pa.array(doubts, pa.float32()))
    with whole_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
