"""The world of the demo: handwritten digits, of which people prefer the bolder ones."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from fastpo.config import Section, decides, flatten, with_keys
from fastpo.config.fields import Fraction, PositiveInt
from fastpo.demo.base import SHORT as SHORT_BASE
from fastpo.demo.base import build_base
from fastpo.demo.digits import to_gray
from fastpo.demo.preferences import FILE, write_preferences
from fastpo.demo.run import N_PAIRS, N_PAIRS_SHORT, demo_config
from fastpo.demo.scorer import DigitScorer
from fastpo.study.world import Places
from fastpo.system.files import whole_file
from fastpo.types import pair_key

Labels = Literal["ink", "bradley_terry", "subtle", "two_tastes"]
UIDS = ("image_0_uid", "image_1_uid")
SUBTLE = 0.02  # of ink: pairs that differ by less are subtle
CARELESS = 0.01  # of ink: the scale on which errors of a Bradley-Terry annotator fall off


class Digits(Section):
    """Handwritten digits at 32x32; the bolder of two is preferred."""

    name: ClassVar[str] = "digits"
    columns: ClassVar[Mapping[str, str]] = {
        "reward": "ink_reward",
        "legible": "legible",
        "minority_reward": "lower_reward",
    }

    labels: Annotated[Labels, decides("cache", "run")] = "ink"
    """Who gives the labels. `ink`: the bolder image is always preferred. `bradley_terry`: errors
    are the likelier, the less the images differ, 1 / (1 + exp(|difference in ink| / 0.01)).
    `subtle`: as `ink`, of pairs that differ by less than 0.02 alone. `two_tastes`: a minority
    prefers what holds its ink in the lower half, whatever its amount."""
    minority: Annotated[Fraction, decides("cache", "run")] = 0.3
    """With `two_tastes`, the minority's share of the pairs."""
    rows: Annotated[PositiveInt, decides("cache", "run")] = N_PAIRS
    """Rows of preferences that are written; about a quarter of them are ties and fall out."""

    def build_base(self, root: Path, *, short: bool) -> Path:
        """See `World`."""
        if short:
            return build_base(root / "digits-short", recipe=SHORT_BASE)
        return build_base(root / "digits")

    def write_preferences(
        self, folder: Path, *, base: Path, seed: int, short: bool
    ) -> frozenset[str]:
        """See `World`."""
        rows = min(self.rows, N_PAIRS_SHORT) if short else self.rows
        write_preferences(folder, n_pairs=rows, seed=seed)
        return frozenset() if self.labels == "ink" else self._relabel(folder / "data" / FILE)

    def plain(self, places: Places, *, seed: int, short: bool) -> dict[str, Any]:
        """See `World`."""
        paths = {"base": places.base, "preferences": places.preferences, "work": places.run}
        raw = demo_config("dpo", paths, seed=seed, short=short).model_dump(mode="json")
        own = {
            "data": {"flip_rate": 0.0},
            "prepare": {"cache_dir": str(places.cache)},
            "train": {"output_dir": str(places.run)},
        }
        return with_keys(raw, flatten(own))

    def scorers(self, base: Path) -> Sequence[DigitScorer | LowerScorer]:
        """See `World`."""
        return [DigitScorer(), LowerScorer()]

    def _relabel(self, path: Path) -> frozenset[str]:
        """Rewrites clean labels; returns the pairs that a metric should find."""
        table = pq.read_table(path)
        rows, found = [], set()
        for row in table.to_pylist():
            grays = [to_gray(Image.open(io.BytesIO(row[k]))) for k in ("jpg_0", "jpg_1")]
            ink = darkness(grays[0]) - darkness(grays[1])
            lower = lower_surplus(grays[0]) - lower_surplus(grays[1])
            if row["label_0"] == 0.5 or (self.labels == "subtle" and abs(ink) >= SUBTLE):
                continue
            turned = False
            if self.labels == "bradley_terry":
                turned = chance(row) < 1.0 / (1.0 + math.exp(abs(ink) / CARELESS))
                looked_for = turned
            else:
                looked_for = self.labels == "two_tastes" and chance(row) < self.minority
                turned = looked_for and (ink > 0) != (lower > 0)
            if looked_for:
                found.add(":".join(str(row[k]) for k in ("ranking_id", *UIDS)))
            if turned:
                row["label_0"], row["label_1"] = row["label_1"], row["label_0"]
                row["best_image_uid"] = row[UIDS[int(row["label_1"])]]
            rows.append(row)
        with whole_file(path) as whole:
            pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), whole)
        return frozenset(found)


class LowerScorer:
    """Scores images by the taste of `two_tastes`' minority.

    Metric `lower_reward`: how much darker the lower half is than the upper one, if the image is
    read as the prompted digit, else 0.
    """

    name = "lower half"

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> dict[str, NDArray[np.float64]]:
        """Returns one array `(N,)`; errors as in `DigitScorer.score`."""
        legible = DigitScorer().score(images, prompts)["legible"]
        surplus = np.array([lower_surplus(to_gray(image)) for image in images], dtype=np.float64)
        return {"lower_reward": surplus * legible}


def darkness(gray: NDArray[np.uint8]) -> float:
    """The mean darkness of `(H, W)` uint8: 0 is white paper, 1 is a black sheet."""
    return float(1.0 - gray.mean() / 255.0)


def lower_surplus(gray: NDArray[np.uint8]) -> float:
    """How much darker the lower half of `(H, W)` uint8 is than the upper one, in [-1, 1]."""
    half = len(gray) // 2
    return darkness(gray[half:]) - darkness(gray[:half])


def chance(row: Mapping[str, Any]) -> float:
    """A number in [0, 1) that depends on the pair alone."""
    return pair_key(f"chance {row['ranking_id']}") / 2.0**63
