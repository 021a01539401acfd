"""`fastpo relabel`: a cleaned copy of a data set, with a list of what changed and why.

The copy is WebDataset shards, whatever the data were: `train-000000.tar` and so on, which hold each
pair's images byte for byte, its prompt and name, and its label. `source: folder` reads them. Pairs
keep their names, so flips, held-out pairs and noise are the same ones.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fastpo.config import Config, input_paths, load_config
from fastpo.data.cache.flips import is_flipped
from fastpo.data.sources import open_source
from fastpo.errors import ConfigError, DataError
from fastpo.evaluate.scorers import build_scorers, needs_groups
from fastpo.review.decide import (
    UNREADABLE,
    Action,
    Decision,
    Jury,
    agreement_table,
    by_marks,
    by_probability,
    check_names,
    read_marks,
)
from fastpo.review.evidence import CONFIG, Evidence, load_evidence
from fastpo.system.files import check_folder, write_json
from fastpo.system.ownership import Kind, owned_folder, protecting
from fastpo.system.progress import progress_bar
from fastpo.system.retry import retrying
from fastpo.system.storage import storage_errors
from fastpo.types import PreferencePair

CHANGES, SUMMARY = "changes.jsonl", "summary.json"
RELABELED = Kind(
    "a relabeled data set", r"train-\d{6}\.tar|changes\.jsonl|summary\.json", lambda _: False
)
SHARD = 1 << 30
"""Bytes from which on the next shard is begun."""
LABELS = {"kept": (1, 0), "turned": (0, 1), "tied": (0.5, 0.5)}
TOGETHER = 32
"""Pairs that scorers see at once."""


@dataclass(frozen=True)
class Rules:
    """Who decides on labels.

    Attributes:
        threshold: Probability of a wrong label from which on it is changed; None: nobody's.
        marks: A reviewer's file; its verdicts go before the threshold.
        by: Scorers, by their names in `evaluate.scorers`; alone.
        action: What becomes of a label that is found wrong. None: it is dropped by the threshold,
            turned round by a reviewer and by scorers.
        weigh: Give each pair a weight, from how far apart the scorers rate its images.
        batch_size: Images that the scorers rate at once. None: `evaluate.score_batch_size`.
        precision: What they compute in. None: `evaluate.score_precision`.
    """

    threshold: float | None = None
    marks: Path | None = None
    by: Sequence[str] = ()
    action: Action | None = None
    weigh: bool = False
    batch_size: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None

    def check(self) -> None:
        """Refuses rules that decide nothing, or twice.

        Raises:
            ConfigError: The text says what is missing.
        """
        if self.by and (self.threshold is not None or self.marks is not None):
            raise ConfigError("--by decides alone; leave --threshold and --marks out")
        if self.weigh and not self.by:
            raise ConfigError("--weigh takes weights from scorers; name them with --by SCORER")
        if not self.by and (self.batch_size is not None or self.precision is not None):
            raise ConfigError(
                "--batch-size and --precision are the scorers'; name them with --by SCORER"
            )
        if not self.by and self.threshold is None and self.marks is None:
            raise ConfigError(
                "nothing says which labels to change: give --threshold 0.9, --marks FILE (which "
                "the gallery of `fastpo minority` saves) or --by SCORER"
            )


@storage_errors()
def relabel(source: Path, out: Path, rules: Rules, *, progress: bool = True) -> dict[str, Any]:
    """Writes a cleaned copy of the data set that a run was trained on.

    Labels are those that the run was given: where it flipped some on purpose, these are the ones
    that are kept or changed.

    Args:
        source: The run's folder; for scorers its YAML file serves too.
        out: The folder to make; nothing may be there, or an earlier call's work.
        rules: Who decides.
        progress: Show a progress bar, and the agreement of scorers.

    Returns:
        What `summary.json` holds.

    Raises:
        ConfigError: The rules or the configuration cannot be followed.
        DataError: The run is not finished, a file is damaged, the data set cannot be read, no
            probability could be learned for the threshold, or no pair would be left.
        ForeignPathError: `out` holds other things, or what the data are read from.
    """
    rules.check()
    check_folder(out.parent)
    evidence = None if rules.by else load_evidence(source)
    if evidence is not None:
        config = evidence.config
        if rules.threshold is not None and evidence.calibration is None:
            raise DataError(
                f"--threshold cuts at the probability that a label is wrong, which {source} does "
                "not tell: it judged too few pairs, or its votes are too weak (fastpo minority "
                "shows them). Give --marks, or a run with train.annotators: {kind: ledger} and "
                "weight_kind: gate, more epochs, or train.rounds"
            )
    else:
        config = load_config(source / CONFIG if source.is_dir() else source)
    reads = [source, *input_paths(config), *(() if rules.marks is None else (rules.marks,))]
    with protecting(reads), owned_folder(out, RELABELED) as folder:
        jury = _jury(rules, config) if rules.by else None
        pairs = given_pairs(config)
        if evidence is not None:
            decided = _by_evidence(pairs, evidence, rules)
        else:
            assert jury is not None
            decided = _by_jury(pairs, jury)
            if rules.weigh:  # only when all pairs are rated are the weights known
                total = len(open_source(config.data.with_all_bad()))
                decided = zip(
                    given_pairs(config), _rated(decided, jury, total, progress), strict=True
                )
        counts = _write(folder, decided, len(open_source(config.data.with_all_bad())), progress)
        summary: dict[str, Any] = {
            "data": config.data.title,
            "from": str(source),
            "threshold": rules.threshold,
            "marks": None if rules.marks is None else str(rules.marks),
            "by": list(rules.by),
            **({"weigh": True} if rules.weigh else {}),
            "pairs": counts.total(),
            **{name: counts[name] for name in ("kept", "dropped", "tied", "turned")},
        }
        if counts["kept"] + counts["turned"] == 0:
            raise DataError(f"no labeled pair would be left of {config.data.title}")
        if jury is not None:
            summary["agreement"] = jury.agreement()
        write_json(folder / SUMMARY, summary)
    if jury is not None and progress:
        Console(stderr=True).print(agreement_table(summary["agreement"]))
    return summary


def given_pairs(config: Config) -> Iterator[PreferencePair]:
    """The pairs with the labels that a run of the configuration is given."""
    rate, seed = config.data.flip_rate, config.data.flip_seed
    for pair in open_source(config.data.with_all_bad()):
        if rate > 0 and is_flipped(pair.pair_id, rate=rate, seed=seed):
            yield replace(pair, winner=pair.loser, loser=pair.winner, flipped=True)
        else:
            yield pair


def _jury(rules: Rules, config: Config) -> Jury:
    """The scorers that decide, run as the configuration's section `evaluate` says.

    Raises:
        ConfigError: One is unknown, or rates sets of images.
        ModelError: One's model is not available.
    """
    options = config.evaluate
    scorers = build_scorers(
        rules.by,
        batch_size=rules.batch_size or options.score_batch_size,
        precision=rules.precision or options.score_precision,
    )
    for scorer in scorers:
        if needs_groups(scorer):
            raise ConfigError(f"--by {scorer.name} rates sets of images, and prefers no single one")
    return Jury(scorers, rules.action or "turn")


Decided = Iterator[tuple[PreferencePair, Decision]]


def _by_evidence(pairs: Iterator[PreferencePair], evidence: Evidence, rules: Rules) -> Decided:
    """Decides by a reviewer and the run's probabilities; pairs that it lacks stay as they are."""
    marks = {} if rules.marks is None else read_marks(rules.marks)
    check_names(marks, evidence.pair_ids, rules.marks or Path())
    judged = zip(evidence.pair_ids, evidence.probability.tolist(), evidence.visits, strict=True)
    known = {name: probability for name, probability, visits in judged if visits > 0}
    for pair in pairs:
        decision = Decision()
        if pair.pair_id in marks:
            decision = by_marks(marks[pair.pair_id], rules.action or "turn")
        elif rules.threshold is not None and pair.pair_id in known:
            action = rules.action or "drop"
            decision = by_probability(known[pair.pair_id], rules.threshold, action)
        yield pair, decision


def _by_jury(pairs: Iterator[PreferencePair], jury: Jury) -> Decided:
    while some := list(islice(pairs, TOGETHER)):
        yield from zip(some, jury.decide(some), strict=True)


def _rated(decided: Decided, jury: Jury, total: int, progress: bool) -> list[Decision]:
    """Lets the scorers rate all pairs, and returns the decisions with weights."""
    decisions = []
    with progress_bar("rate", total, unit="pairs", show=progress) as advance:
        for _, decision in decided:
            decisions.append(decision)
            advance(1)
    return jury.weighed(decisions)


def _write(folder: Path, decided: Decided, total: int, progress: bool) -> Counter[str]:
    """Writes shards and the list of changes; counts what became of the labels."""
    counts: Counter[str] = Counter()
    shards = Shards(folder)
    with (
        (folder / CHANGES).open("w", encoding="utf-8") as changes,
        progress_bar("relabel", total, unit="pairs", show=progress) as advance,
        shards.closing(),
    ):
        for pair, decision in decided:
            if decision.change != "dropped":
                fault = shards.add(pair, decision)
                decision = decision if fault is None else Decision("dropped", fault)
            counts[decision.change] += 1
            if decision.why:
                row = {"pair_id": pair.pair_id, "change": decision.change, "why": decision.why}
                changes.write(json.dumps(row) + "\n")
            advance(1)
    return counts


class Shards:
    """The tar files of a data set, one open at a time.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._tar = folder, None
        self._shard = self._pair = self._bytes = 0

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Ends the last file behind the block."""
        try:
            yield
        finally:
            if self._tar is not None:
                self._tar.close()

    def add(self, pair: PreferencePair, decision: Decision) -> str | None:
        """Writes a pair; returns why it has none where an image cannot be read."""
        readers = {"jpg_0": pair.winner, "jpg_1": pair.loser}
        for number, read in enumerate(pair.source_images, 1):
            readers["source" if number == 1 else f"source_{number}"] = read
        try:
            images = {name: retrying(read) for name, read in readers.items()}
        except OSError as error:
            return f"{UNREADABLE}{' '.join(str(error).split())[:200]}"
        labels = dict(zip(("label_0", "label_1"), LABELS[decision.change], strict=True))
        about = {"id": pair.pair_id, "prompt": pair.prompt, **labels}
        weight = pair.weight if decision.weight is None else decision.weight
        if weight is not None:
            about["pair_weight"] = weight
        if self._tar is None or self._bytes > SHARD:
            if self._tar is not None:
                self._tar.close()
            self._tar = tarfile.open(self._folder / f"train-{self._shard:06d}.tar", "w")
            self._shard, self._bytes = self._shard + 1, 0
        content = [("json", json.dumps(about).encode())]
        content += images.items()
        for name, data in content:
            member = tarfile.TarInfo(f"{self._pair:09d}.{name}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
            self._bytes += len(data)
        self._pair += 1
        return None
