"""A disk that loses power, is full, or answers with an error, put under the durable write.

`fastpo.system.files` calls a function before each step that changes what the disk holds for good.
`Disk` follows these steps, and knows from them what a disk must have kept, and what it may have
lost: the content of files and the names in folders that were not flushed. This is what POSIX
promises; most disks keep more.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

from fastpo.system import files

Loss = Literal["nothing", "content", "names", "both", "some"]
"""What is lost of what was not flushed; of `some`, each file and folder decides at random."""
LOSSES: tuple[Loss, ...] = ("content", "names", "both", "some")

ENDED = 86
"""Exit status of a process that was ended at a durable step."""


def count_steps(tell: Callable[[str, int], None]) -> None:
    """Tells the number of each durable step of this process."""
    _at_each_step(lambda number: tell("step", number))


def end_at(step: int, place: Path, loss: Loss) -> None:
    """Ends this process before a durable step, as a kill or a power cut does.

    Args:
        step: Number of the step, from 0.
        place: The folder that the disk holds; losses show in it.
        loss: `nothing` for a kill.
    """
    if loss == "nothing":
        _at_each_step(lambda number: os._exit(ENDED) if number == step else None)
        return
    disk = Disk(place)

    def commit(number: int) -> None:
        if number == step:
            disk.cut(loss, random.Random(step))

    _at_each_step(commit, disk)


def fail_at(step: int, error: int, *, lasting: bool) -> None:
    """Lets a durable step of this process fail with an `OSError` of this number.

    Args:
        step: Number of the step, from 0.
        error: `errno.ENOSPC` or another.
        lasting: All later steps fail too.
    """

    def commit(number: int) -> None:
        if number == step or (lasting and number > step):
            raise OSError(error, os.strerror(error))

    _at_each_step(commit)


def _at_each_step(act: Callable[[int], object], disk: Disk | None = None) -> None:
    number = -1

    def commit(step: files.Step, path: Path) -> None:
        nonlocal number
        number += 1
        if disk is not None:
            disk.before(step, path)
        act(number)

    files._commit = commit


class Disk:
    """Knows what a disk must have kept of a folder.

    Each file is held by a second name outside the folder, so that it can come back after it was
    removed; each folder by a descriptor, so that its number is not given to another.

    Args:
        place: The folder; what it holds now is on the disk for good.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._held = place.with_name(place.name + ".held")
        self._held.mkdir()
        self._names: dict[int, dict[str, int]] = {}
        self._sizes: dict[int, int] = {}
        self._folders: dict[int, int] = {}
        self._flushed: Path | None = None
        self._hold()
        for folder, _, _ in os.walk(place):
            self._keep(Path(folder))

    def before(self, step: files.Step, path: Path) -> None:
        """Follows a durable step that is about to be taken."""
        if self._flushed is not None and self._flushed.exists():
            self._keep_flushed(self._flushed)
        self._hold()
        self._flushed = path if step == "flush" else None

    def cut(self, loss: Loss, chance: random.Random) -> NoReturn:
        """Leaves in the folder what the disk has kept, and ends the process."""
        kept = self._place.with_name(self._place.name + ".kept")
        self._restore(os.stat(self._place).st_ino, self._place, kept, loss, chance)
        shutil.rmtree(self._place)
        kept.rename(self._place)
        shutil.rmtree(self._held)
        os._exit(ENDED)

    def _hold(self) -> None:
        """Gets hold of every file and folder that is new."""
        for place, _, names in os.walk(self._place):
            number = os.stat(place).st_ino
            if number not in self._folders:
                self._folders[number] = os.open(place, os.O_RDONLY)
                self._names[number] = {}
            for name in names:
                file = Path(place, name)
                held = self._held / str(file.stat().st_ino)
                if not held.exists():
                    os.link(file, held)
                    self._sizes[file.stat().st_ino] = 0

    def _keep(self, folder: Path) -> None:
        """Takes everything directly in a folder for flushed."""
        self._keep_flushed(folder)
        for file in folder.iterdir():
            if file.is_file():
                self._keep_flushed(file)

    def _keep_flushed(self, path: Path) -> None:
        if path.is_dir():
            self._names[path.stat().st_ino] = _numbers(path)
        else:
            self._sizes[path.stat().st_ino] = path.stat().st_size

    def _restore(
        self, number: int, now: Path, target: Path, loss: Loss, chance: random.Random
    ) -> None:
        """Writes a folder as the disk has kept it.

        Args:
            number: Of the folder.
            now: Where it is now, if it is.
            target: Where to write it.
            loss: What is lost.
            chance: Decides for `some`.
        """
        target.mkdir()
        undone = loss in ("names", "both") or (loss == "some" and chance.random() < 0.5)
        exists = now.is_dir() and now.stat().st_ino == number
        names = _numbers(now) if exists and not undone else self._names[number]
        for name, inner in names.items():
            if inner in self._folders:
                self._restore(inner, now / name, target / name, loss, chance)
                continue
            cut = loss in ("content", "both") or (loss == "some" and chance.random() < 0.5)
            content = (self._held / str(inner)).read_bytes()
            (target / name).write_bytes(content[: self._sizes[inner]] if cut else content)


def _numbers(folder: Path) -> dict[str, int]:
    """The numbers of what a folder holds, by name."""
    return {path.name: path.stat().st_ino for path in folder.iterdir()}
