"""What a study runs in: a small base model, preferences, and the numbers that judge a run.

`fastpo/study/digits.py` is one, and `fastpo/study/worlds.py` lists all of them. A study trains many
runs in a world and knows nothing of its pictures: another world is a class with what `World` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from fastpo.evaluate.scorers import Scorer


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run of a study finds what it needs.

    Attributes:
        base: The base model's folder, as `World.build_base` returned it.
        preferences: The folder that `World.write_preferences` filled.
        cache: The folder for the prepared pairs; runs of one seed share it.
        run: The run's own folder, `train.output_dir`.
    """

    base: Path
    preferences: Path
    cache: Path
    run: Path


@runtime_checkable
class World(Protocol):
    """A base model, preference data of known truth, and scores.

    A world is a `fastpo.config.Section`, so that a study's YAML can set what it varies
    (`world: {name: digits, labels: subtle}`), and is compared by these values. With `short` it
    makes everything as small as it can: seconds, numbers without meaning.

    Attributes:
        name: Its name in a study's YAML.
        columns: From the study's columns to metrics of `scorers`: `reward`, which the preferences
            ask for, and `legible`, the share of images that show what the prompt names; more as
            the world has them, such as `minority_reward`.
    """

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]

    def build_base(self, root: Path, *, short: bool) -> Path:
        """Trains the base into a folder below `root`, or finds it there; returns that folder.

        Worlds whose bases are the same use the same folder.
        """
        ...

    def write_preferences(
        self, folder: Path, *, base: Path, seed: int, short: bool
    ) -> frozenset[str]:
        """Writes the preferences of a seed to `folder`, anew if they are there.

        `base` is the folder that `build_base` returned: worlds may keep their pictures by it.

        Labels that a study flips are not made here, but by `data.flip_rate` when a run reads them.

        Returns:
            The ids of pairs that a metric should find beside those flipped: labels that are wrong
            in the data, or the votes of a minority.
        """
        ...

    def plain(self, places: Places, *, seed: int, short: bool) -> dict[str, Any]:
        """Returns the configuration of plain DPO on these preferences, as nested mappings.

        It holds the folders of `places`, the seed, and what the evaluation samples: prompts and
        seeds that neither base nor preferences used. A study changes the method by its key paths.
        """
        ...

    def scorers(self, base: Path) -> Sequence[Scorer]:
        """Returns the scorers whose metrics `columns` names; `base` as `build_base` returned it."""
        ...
