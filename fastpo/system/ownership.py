"""What is ours: only a command's own earlier work is ever replaced or removed.

Every folder that a command makes holds a marker, the file `.fastpo`: which kind of folder it is, of
which version, and for folders that are put in place whole (an export, a checkpoint, a set of
images) which files it was made with. Folders of versions that wrote no marker are recognized by the
names and, where names prove little, by the content of their files.

A path that exists and is not proven to be ours is refused by name. So is a symbolic link, whose
content may be somebody else's, a folder into which somebody else has put a file, and whatever holds
a file that the command was configured from (`protected`).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fastpo._version import __version__
from fastpo.errors import FastPOError, ForeignPathError
from fastpo.system import files

MARKER = ".fastpo"
# Locks, and what file managers and network file systems leave in a folder by themselves.
_NOBODYS = re.compile(
    r"\.(writer|claims|DS_Store|directory|gitkeep|nfs\w+)|Thumbs\.db|desktop\.ini"
)
_protected: ContextVar[tuple[Path, ...]] = ContextVar("protected", default=())


@dataclass(frozen=True)
class Kind:
    """A kind of folder that commands make.

    Attributes:
        name: What messages and markers call it, with its article.
        files: Pattern of the paths, in the folder, of the files that earlier versions put there.
        proof: Whether a folder without a marker is one, judged by the content of its files.
    """

    name: str
    files: str
    proof: Callable[[Path], bool]


class Marker(BaseModel):
    """What `.fastpo` holds.

    Attributes:
        kind: `Kind.name`.
        version: The version of FastPO that made the folder.
        id: Tells this folder from every other of its kind; None where equal runs make equal files.
        files: The paths in the folder of all files that it was made with; None where files come
            and go.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: str
    version: str
    id: str | None = None
    files: list[str] | None = None


def read_marker(folder: Path) -> Marker | None:
    """Returns a folder's marker; None if there is none, or the file `.fastpo` is no marker."""
    try:
        return Marker.model_validate_json((folder / MARKER).read_bytes())
    except (OSError, ValidationError):
        return None


def write_marker(folder: Path, kind: Kind) -> None:
    """Marks a folder whose files come and go.

    Raises:
        OSError: It cannot be written.
    """
    marker = Marker(kind=kind.name, version=__version__, id=uuid.uuid4().hex)
    files.write_text(folder / MARKER, marker.model_dump_json() + "\n")


def is_ours(folder: Path, kind: Kind) -> bool:
    """Whether a folder is proven to be of a kind, by its marker or, without one, its content."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    marker = read_marker(folder)
    if marker is not None and marker.kind == kind.name:
        return True
    return (marker is not None or not os.path.lexists(folder / MARKER)) and kind.proof(folder)


def strangers(folder: Path, kind: Kind) -> list[str]:
    """Returns the paths, in a folder of ours, of files that no command put there; sorted."""
    marker = read_marker(folder)
    known = None if marker is None or marker.kind != kind.name else marker.files
    pattern = re.compile(kind.files)
    return sorted(
        name
        for name in files_below(folder)
        if not (pattern.fullmatch(name) if known is None else name in known)
    )


def files_below(folder: Path) -> Iterator[str]:
    """Yields the paths, in a folder, of its files and links; not of markers and temporaries."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        folders[:] = [name for name in folders if not files.is_temporary(name)]
        for name in (*names, *links):
            if not (name == MARKER or files.is_temporary(name) or _NOBODYS.fullmatch(name)):
                yield Path(place, name).relative_to(folder).as_posix()


def check_replaceable(target: Path, kind: Kind) -> None:
    """Refuses to replace or remove what is not proven to be ours, as a whole.

    Args:
        target: The folder; nothing may be there.
        kind: What it must be.

    Raises:
        ForeignPathError: It is a link, a file, a folder of something else, or a folder of ours with
            a file that is not; or a file lies in it that the command was configured from.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        raise ForeignPathError(
            f"{target} is a link, which is never followed to replace what it leads to: remove it, "
            "or give another folder"
        )
    if not is_ours(target, kind) and not _may_become_ours(target):
        raise _foreign(target, kind)
    for name in strangers(target, kind):
        raise ForeignPathError(
            f"{target / name} is not {kind.name}'s, and {target} would be replaced with it: move "
            "it, or give another folder"
        )
    check_unprotected(target)


def check_new(target: Path, error: type[FastPOError]) -> None:
    """Refuses a file's name that is taken, by a link that leads nowhere too, or cannot be used.

    It is for the time before the work; whoever writes the file then makes its missing folders.

    Args:
        target: The file to write.
        error: What to raise.

    Raises:
        FastPOError: Of that class; the text names the file.
        StorageError: Its folder cannot be made or written in.
    """
    if os.path.lexists(target):
        raise error(f"{target} exists and is not replaced: name another file")
    files.check_folder(target.parent)


def check_claim(folder: Path, kind: Kind) -> None:
    """Refuses, before any work, what `claim` would refuse after it; makes nothing.

    Raises:
        ForeignPathError: It is a file, or a folder of something else.
        StorageError: It cannot be made or written in.
    """
    if os.path.lexists(folder):
        # a link to a folder of ours is fine: in it, names alone are replaced
        ours = folder.is_dir() and is_ours(folder.resolve(), kind)
        if not ours and not _may_become_ours(folder):
            raise _foreign(folder, kind)
    files.check_folder(folder)


def claim(folder: Path, kind: Kind) -> None:
    """Makes a folder, or goes on in one that is ours; other folders must be empty.

    Raises:
        ForeignPathError: It is a file, or a folder of something else.
        OSError: It cannot be made, or its marker cannot be written.
    """
    check_claim(folder, kind)
    if os.path.lexists(folder / MARKER) and is_ours(folder.resolve(), kind):
        return
    files.make_folder(folder)
    write_marker(folder, kind)


@contextmanager
def owned_folder(target: Path, kind: Kind) -> Iterator[Path]:
    """Gives a temporary folder that takes `target`'s place, marked, if the block ends well.

    Raises:
        ForeignPathError: As `check_replaceable`, before the block and after it.
        OSError: It cannot be written.
    """
    check_replaceable(target, kind)
    with files.whole_folder(target) as temporary:
        yield temporary
        mark_whole(temporary, kind)
        check_replaceable(target, kind)


def mark_whole(folder: Path, kind: Kind) -> None:
    """Marks a folder that is being made, with all files that are in it by now."""
    marker = Marker(kind=kind.name, version=__version__, files=sorted(files_below(folder)))
    (folder / MARKER).write_text(marker.model_dump_json(exclude_none=True) + "\n")


def put_in_place(made: Path, target: Path, kind: Kind) -> None:
    """Marks a folder that was made bit by bit under another name, and moves it to `target`.

    Raises:
        ForeignPathError: As `check_replaceable`; `made` stays.
        OSError: It cannot be moved.
    """
    check_replaceable(target, kind)
    mark_whole(made, kind)
    files.replace_folder(made, target)


def remove_owned(target: Path, kind: Kind) -> None:
    """Removes a folder of ours, if it exists.

    Raises:
        ForeignPathError: As `check_replaceable`; it stays.
    """
    check_replaceable(target, kind)
    files.remove(target)


def remove_file(path: Path, kind: Kind) -> None:
    """Removes a file, or a link but not what it leads to, from a folder of ours, if it exists.

    Raises:
        ForeignPathError: The folder that holds it is none of ours, or it is a folder, or the
            command was configured from it.
    """
    if not os.path.lexists(path):
        return
    if not is_ours(path.parent.resolve(), kind) or (path.is_dir() and not path.is_symlink()):
        raise ForeignPathError(f"{path} is not {kind.name}'s, so it is not removed: move it")
    check_unprotected(path)
    files.remove(path)


def _may_become_ours(folder: Path) -> bool:
    """Whether it is a folder without a marker that holds nothing but hidden files."""
    if not folder.is_dir() or os.path.lexists(folder / MARKER):
        return False
    names = (path.name for path in folder.iterdir())
    return all(name.startswith(".") or _NOBODYS.fullmatch(name) for name in names)


@contextmanager
def protecting(paths: Iterable[Path]) -> Iterator[None]:
    """Lets no command in the block replace or remove some paths, or a folder that holds one.

    Args:
        paths: What the command was configured from; those that do not exist are left out.
    """
    token = _protected.set(
        (*_protected.get(), *(Path(os.path.realpath(p)) for p in paths if os.path.lexists(p)))
    )
    try:
        yield
    finally:
        _protected.reset(token)


def is_protected(path: Path) -> bool:
    """Whether a command is configured from a path itself, links followed."""
    return Path(os.path.realpath(path)) in _protected.get()


def check_unprotected(target: Path) -> None:
    """Refuses to touch what a command was configured from.

    Raises:
        ForeignPathError: `target` is, or holds, such a path.
    """
    whole = Path(os.path.realpath(target))
    for path in _protected.get():
        if path.is_relative_to(whole):
            raise ForeignPathError(
                f"this command reads {path}, which it would replace or remove with {target}: give "
                "another folder"
            )


def _foreign(target: Path, kind: Kind) -> ForeignPathError:
    marker = read_marker(target)
    if marker is not None:
        found = f"{marker.kind} of FastPO {marker.version}"
    elif target.is_dir():
        found = f"a folder that FastPO has not made (it holds {files.listing(target)})"
    else:
        found = "no folder"
    return ForeignPathError(
        f"{target} is {found}, not {kind.name}, and nothing in it is replaced: give another folder"
    )
