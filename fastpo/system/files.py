"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside `target` that takes its place if the block ends well."""
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Writes a text file."""
    with whole_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Gives a fresh temporary folder that takes `target`'s place if the block ends well."""
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed processes left in `folder`; call it where no other process writes.

    A folder that was killed between the two renames of `replace_folder` gets its old content back.
    """
    for left in folder.glob(".*.old-*"):
        target = folder / left.name[1:].rpartition(".old-")[0]
        if target.exists():
            shutil.rmtree(left)
        else:
            left.rename(target)
    for left in folder.glob(".*.partial-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def replace_folder(new: Path, target: Path) -> None:
    """Moves `new` into `target`'s place; `target` is gone for no longer than two renames take."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
