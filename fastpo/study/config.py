"""A study's YAML: which methods are trained on which labels, and with which seeds.

Everything that a run is made of is the trainer's own configuration. A study sets its keys by their
full names (`set: {train.epochs: 4}`), as `--set` does on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fastpo.config import Section, decides
from fastpo.config.fields import Chance, Seed
from fastpo.config.load import read_yaml
from fastpo.config.messages import explain
from fastpo.errors import ConfigError
from fastpo.study import STUDIES
from fastpo.study.methods import METHODS
from fastpo.study.world import World
from fastpo.study.worlds import build_world

SECTIONS = ("state", "methods", "calibration")
"""Of a study's page, beside its parts."""


def _known(name: str) -> str:
    """Refuses a method that is in no table."""
    if name not in METHODS:
        raise ValueError(f"methods: expected names of {', '.join(METHODS)}, got {name!r}")
    return name


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuses a value that is given twice: it would be one run."""
    if len(set(values)) < len(values):
        raise ValueError(f"each value may be given once, got {list(values)}")
    return values


AnyWorld = Annotated[World, BeforeValidator(build_world)]
MethodName = Annotated[str, AfterValidator(_known)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]
Flips = Annotated[tuple[Chance, ...], Field(min_length=1), AfterValidator(_distinct)]
Methods = Annotated[tuple[MethodName, ...], Field(min_length=1), AfterValidator(_distinct)]
Keys = dict[str, Any]
CaseName = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[^|\n]+$")]
PartName = Annotated[str, Field(pattern=r"^[a-z0-9_-]+$", max_length=40)]


class Part(Section):
    """Runs that are compared with one another: each method on each share of flipped labels."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: Annotated[PartName, decides("nothing")]
    """Names the part in the table of all runs and on the page."""
    title: Annotated[str, decides("nothing")] = ""
    """What the page says above its tables."""
    world: Annotated[AnyWorld | None, decides("cache", "run")] = None
    """Instead of the study's."""
    seeds: Annotated[Seeds | None, decides("run")] = None
    """Instead of the study's."""
    flips: Annotated[Flips, decides("run")] = (0.0,)
    """Shares of the labels that are flipped at random."""
    methods: Annotated[Methods, decides("run")]
    """Names of `fastpo/study/methods.py`, the most important first."""
    set: Annotated[Keys, decides("run")] = Field(default_factory=dict)
    """Keys of the trainer's configuration, for all runs of the part."""
    vary: Annotated[dict[CaseName, Keys], decides("run")] = Field(default_factory=dict)
    """Cases by name, each with keys that it sets beside `set`; each method is run in each case.
    Without any there is one case, without a name."""

    columns: Annotated[tuple[str, ...], decides("nothing")] = ()
    """Of the world's columns, those that the page shows beside reward and legibility."""

    @property
    def cases(self) -> Mapping[str, Keys]:
        """The keys that each case sets, by its name."""
        return self.vary or {"": {}}


class StudyConfig(Section):
    """A whole study."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    world: Annotated[AnyWorld, decides("cache", "run")]
    """By its name, or `{name: digits, rows: 1000}` with what differs from its defaults."""
    seeds: Annotated[Seeds, decides("run")] = (0, 1, 2)
    """Seeds of preferences, flipped labels and training."""
    set: Annotated[Keys, decides("run")] = Field(default_factory=dict)
    """Keys of the trainer's configuration, for all runs."""
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    """What is compared; a seed's runs are made part by part."""
    calibration: Annotated[tuple[MethodName, ...], decides("nothing")] = ()
    """Methods of which the page's section `calibration` says whether their probabilities of a wrong
    label are true ones."""

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"parts: each needs a name of its own, got {', '.join(names)}")
        for name in set(names) & set(SECTIONS):
            raise ValueError(f"parts: {name} is the name of a section of every page; give another")
        return self


def load_study(path: Path) -> StudyConfig:
    """Reads a study.

    Args:
        path: A YAML file, or the name of one that is shipped, such as `digits`.

    Raises:
        ConfigError: There is none, or a key is unknown or wrong.
    """
    ours = STUDIES / f"{path}.yaml"
    if path.name == str(path) and not path.exists() and ours.is_file():
        path = ours
    try:
        return StudyConfig.model_validate(_keyed(read_yaml(path)))
    except ValidationError as error:
        lines = [explain(e, StudyConfig) for e in error.errors()]
        text = f"{path}: " + "; ".join(dict.fromkeys(lines))
        raise ConfigError(" ".join(text.splitlines())) from None


def _keyed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with text for its keys: YAML allows others, which no section has."""
    return {str(key): value for key, value in raw.items()}
