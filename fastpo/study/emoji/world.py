"""The color world of a study: emoji, a base that knows one style, preferences for color or style.

Below a study's folder of bases it keeps

    emoji-32/pictures/  both styles of all names
    emoji-32/base/      the base model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field

from fastpo.config import Section, decides, flatten, with_keys
from fastpo.config.fields import PositiveInt, Share
from fastpo.study.emoji.base import SHORT, build_emoji_base
from fastpo.study.emoji.packages import fetched, packages_in
from fastpo.study.emoji.pictures import FILE, read_pictures, write_pictures
from fastpo.study.emoji.preferences import write_preferences
from fastpo.study.emoji.scorer import EmojiScorer
from fastpo.study.emoji.text import HELD_OUT, TEMPLATES
from fastpo.study.world import Places
from fastpo.system.files import make_folder
from fastpo.system.locks import FolderLocks

ROWS_SHORT = 24
PASSES: dict[str, Any] = {
    "train.epochs": None,
    "train.max_steps": 4,
    "evaluate.seeds_per_prompt": 1,
}


class Emoji(Section):
    """Emoji in 32 or 64 pixels; the base draws style A alone."""

    name: ClassVar[str] = "emoji"
    columns: ClassVar[Mapping[str, str]] = {
        "reward": "emoji_reward",
        "legible": "legible",
        "color": "color_reward",
        "style": "style_reward",
    }

    mismatch: Annotated[Share, decides("cache", "run")] = 0.0
    """Share of the pairs that prefer style B, which the base never drew, to style A. In the others
    both images are in style A, and the more colorful one is preferred."""
    rows: Annotated[PositiveInt, decides("cache", "run")] = 320
    """Pairs that are written."""
    size: Annotated[Literal[32, 64], decides("cache", "run")] = 32
    """Width and height of the images in pixels."""
    packages: Annotated[Path | None, decides("nothing"), Field(exclude=True)] = None
    """Folder that holds the unpacked npm packages `emoji-datasource-google` and
    `emoji-datasource-twitter`; without it `npm pack` fetches them, once a study."""

    def build_base(self, root: Path, *, short: bool) -> Path:
        """See `World`.

        Raises:
            DataError: There are no packages, and npm cannot fetch them.
        """
        own = root / (f"emoji-{self.size}" + ("-short" if short else ""))
        make_folder(own)
        with FolderLocks(own) as locks, locks.manifest():  # worlds that differ share it
            if not (own / "pictures" / FILE).is_file():
                self._write_pictures(own / "pictures")
            return build_emoji_base(
                own / "base", own / "pictures", recipe=SHORT if short else None, progress=False
            )

    def write_preferences(
        self, folder: Path, *, base: Path, seed: int, short: bool
    ) -> frozenset[str]:
        """See `World`."""
        write_preferences(
            folder,
            read_pictures(base.parent / "pictures", held_out=False),
            n_pairs=min(self.rows, ROWS_SHORT) if short else self.rows,
            mismatch=self.mismatch,
            seed=seed,
        )
        return frozenset()

    def plain(self, places: Places, *, seed: int, short: bool) -> dict[str, Any]:
        """See `World`."""
        raw = yaml.safe_load(files("fastpo.study").joinpath("emoji/emoji.yaml").read_text())
        own = {
            "seed": seed,
            "model": {"path": str(places.base)},
            "data": {"path": str(places.preferences), "flip_seed": seed},
            "prepare": {"cache_dir": str(places.cache), "resolution": self.size},
            "train": {"output_dir": str(places.run)},
            "evaluate": {"prompts": [TEMPLATES[0].format(name) for name in HELD_OUT]},
        }
        raw = with_keys(raw, flatten(own))
        return with_keys(raw, PASSES) if short else raw

    def scorers(self, base: Path) -> Sequence[EmojiScorer]:
        """See `World`."""
        return [EmojiScorer(read_pictures(base.parent / "pictures"), self.mismatch)]

    def _write_pictures(self, folder: Path) -> None:
        if self.packages is not None:
            write_pictures(folder, packages_in(self.packages), size=self.size)
            return
        with fetched() as packages:
            write_pictures(folder, packages, size=self.size)
