"""The runs of a study: what each is made from, in which folder, and in which order they are made.

A run is known by a digest of everything that decides its numbers: world, method, and each key of
its configuration that differs from the default, without folders. So a run is found again whatever
the study's YAML calls it, and one that was made from other settings is not taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from fastpo.config import Config, Section, decides_result, flatten, parse_config, with_keys
from fastpo.study.config import Part, StudyConfig
from fastpo.study.methods import METHODS, Method
from fastpo.study.world import Places, World

LAYOUT = 1  # raised when the numbers of a row come to mean something else
# A digest leaves out keys at their defaults, so that a new key keeps the rows that are known. Where
# a default changes, rows of runs that had the former one are to be taken out of the tables.
FOLDERS = ("model.path", "data.path", "prepare.cache_dir", "train.output_dir")
LENGTHS = ("train.epochs", "train.max_steps", "train.round_epochs")
DECIDED = ("cache", "run", "images")
LENGTH = 12  # of a digest, in a folder's name and in the table


@dataclass(frozen=True)
class Choice:
    """Which of a study's runs to make; an empty collection means all."""

    parts: Collection[str] = ()
    methods: Collection[str] = ()
    seeds: Collection[int] = ()
    flips: Collection[float] = ()

    def __contains__(self, trial: Trial) -> bool:
        """Whether a run is among them."""
        wanted = (
            (self.parts, trial.part.name),
            (self.methods, trial.method_name),
            (self.seeds, trial.seed),
            (self.flips, trial.flip_rate),
        )
        return all(not values or value in values for values, value in wanted)


@dataclass(frozen=True)
class Data:
    """Preferences that several runs share, prepared once: a world's, of one seed.

    Attributes:
        world: Whose they are.
        seed: Of the draw.
        short: Whether they are few.
        keys: Further keys that decide how they are prepared.
    """

    world: World
    seed: int
    short: bool
    keys: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def digest(self) -> str:
        """Names their folder."""
        return _digest([described(self.world), self.seed, self.short, self.keys])

    def folder(self, work: Path) -> Path:
        """Where they lie."""
        return work / "data" / f"{self.world.name}-seed{self.seed}-{self.digest}"


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        part: The part that it belongs to.
        case: The case's name, empty where a part has one alone.
        method_name: Of `METHODS`.
        flip_rate: Share of the labels that are flipped.
        seed: Of preferences, flipped labels and training.
        world: What it runs in.
        keys: Keys of the configuration that the study sets.
        short: Whether it is only tried.
    """

    part: Part
    case: str
    method_name: str
    flip_rate: float
    seed: int
    world: World
    keys: dict[str, Any]
    short: bool

    @property
    def method(self) -> Method:
        """How it is trained."""
        return METHODS[self.method_name]

    @cached_property
    def data(self) -> Data:
        """The preferences that it is trained on."""
        own = {k: str(v) for k, v in self.keys.items() if decides_result(k, "cache")}
        return Data(self.world, self.seed, self.short, tuple(sorted(own.items())))

    @property
    def labels(self) -> dict[str, str]:
        """The columns that tell it from the study's other runs."""
        return {
            "part": self.part.name,
            "case": self.case,
            "method": self.method_name,
            "flip_rate": str(self.flip_rate),
            "seed": str(self.seed),
            "settings": self.digest,
        }

    def config(self, places: Places) -> Config:
        """Returns its configuration in some folders.

        Raises:
            ConfigError: The keys do not go together; the text names the run.
        """
        raw = self.method.apply(_plain(self.world, places, self.seed, self.short), self.flip_rate)
        keys = self.keys
        if self.short:  # the world says how few steps
            raw = with_keys(raw, {"train.round_epochs": None})
            keys = {k: v for k, v in keys.items() if k not in LENGTHS}
        return parse_config(with_keys(raw, keys, where=str(self)), where=str(self))

    @cached_property
    def digest(self) -> str:
        """Of everything that decides its numbers."""
        nowhere = Places(*(Path("-"),) * 4)
        config = self.config(nowhere).model_dump(mode="json", exclude_defaults=True)
        keys = {
            key: value
            for key, value in flatten(config).items()
            if key not in FOLDERS and any(decides_result(key, result) for result in DECIDED)
        }
        trained = [self.method.train.__name__, self.method.version]
        return _digest([LAYOUT, described(self.world), self.short, trained, keys])

    def folder(self, work: Path) -> Path:
        """Where it is made, if no run with the same numbers is."""
        return work / "runs" / f"{self.method_name}-{self.flip_rate:g}-{self.digest}"

    def __str__(self) -> str:
        """As messages name it."""
        case = f" ({self.case})" if self.case else ""
        flips = f"{self.flip_rate:.0%} flipped"
        return f"{self.part.name}{case}: {self.method_name}, {flips}, seed {self.seed}"


def plan(study: StudyConfig, *, short: bool) -> list[Trial]:
    """Lists a study's runs in the order in which they are made.

    Seeds come first, so that a study that is not finished has all methods on few seeds; in a seed
    parts, methods and cases as they are given, then shares. With `short` the first seed alone.

    Raises:
        ConfigError: A run's keys do not go together.
    """
    trials = list(_each(study, short))
    if short:
        first = {trial.part.name: trial.seed for trial in reversed(trials)}
        trials = [trial for trial in trials if trial.seed == first[trial.part.name]]
    for trial in trials:
        _ = trial.digest
    return trials


def _each(study: StudyConfig, short: bool) -> Iterator[Trial]:
    seeds = list(dict.fromkeys(s for part in study.parts for s in part.seeds or study.seeds))
    for seed in seeds:
        for part in study.parts:
            if seed not in (part.seeds or study.seeds):
                continue
            for method in part.methods:
                for case, keys in part.cases.items():
                    for flip_rate in part.flips:
                        world = part.world or study.world
                        all_keys = {**study.set, **part.set, **keys}
                        yield Trial(part, case, method, flip_rate, seed, world, all_keys, short)


@lru_cache(maxsize=64)
def _plain(world: World, places: Places, seed: int, short: bool) -> dict[str, Any]:
    """A world's own configuration, which many runs change."""
    return world.plain(places, seed=seed, short=short)


def described(world: World) -> str:
    """A world's name and what it sets otherwise than by default."""
    assert isinstance(world, Section)
    return f"{world.name} {json.dumps(world.model_dump(mode='json', exclude_defaults=True))}"


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]
