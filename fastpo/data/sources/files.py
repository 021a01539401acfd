"""Reading what a listing names: inside of the data set's folder, and no more than an image has."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fastpo.data.sources.base import printable, shown
from fastpo.errors import DataError
from fastpo.system.pictures import MOST_IMAGE_BYTES as MOST_IMAGE_BYTES

HINT = "set data.allow_outside: true if it is meant"


class DataFolder:
    """The folder whose files a listing may name."""

    def __init__(self, folder: Path, *, allow_outside: bool) -> None:
        """Looks at nothing yet.

        Args:
            folder: The folder that names are relative to.
            allow_outside: `data.allow_outside`: names and links may lead elsewhere.
        """
        self.folder = folder
        self._allow_outside = allow_outside
        self._roots: list[str] = []
        self._parents: dict[str, bool] = {"": True}

    def complaint(self, name: str) -> str | None:
        """Says why a name is not to be read, or returns None; a missing file is no complaint.

        Plain names in plain folders cost one look at the file system each.
        """
        complaint = self.name_complaint(name)
        if complaint is not None or self._allow_outside:
            return complaint
        parent = name.rpartition("/")[0]
        if self._is_plain(parent) and not os.path.islink(self.folder / name):
            return None
        target = os.path.realpath(self.folder / name)
        if not self._roots:
            self._roots = [os.path.realpath(self.folder), *_hub_files(self.folder)]
        if any(os.path.commonpath((target, root)) == root for root in self._roots):
            return None
        return f"{shown(name)} is, or lies behind, a link out of {self.folder}, to {target}; {HINT}"

    def fault(self, name: str) -> str | None:
        """Says why a source image cannot be read: its name, or that it is missing; else None."""
        complaint = self.complaint(name)
        if complaint is not None:
            return f"source image {complaint}"
        if is_file(self.folder, name):
            return None
        return f"source image not found: {printable(str(self.folder / name))}"

    def name_complaint(self, name: str) -> str | None:
        """As `complaint`, from the text alone."""
        if "\0" in name:
            return f"{shown(name)} has a zero byte in its name"
        if not self._allow_outside and (name.startswith("/") or ".." in name.split("/")):
            return f"{shown(name)} leads out of {self.folder}; {HINT}"
        return None

    def _is_plain(self, parent: str) -> bool:
        """Whether no folder on the way is a link; asked once for each folder."""
        known = self._parents.get(parent)
        if known is None:
            above = parent.rpartition("/")[0]
            known = self._is_plain(above) and not os.path.islink(self.folder / parent)
            self._parents[parent] = known
        return known

    def read(self, name: str) -> bytes:
        """Returns a file's bytes.

        Raises:
            OSError: It is missing or cannot be read, is no regular file, or is too large.
            DataError: It lies outside of the folder.
        """
        complaint = self.complaint(name)
        if complaint is not None:
            raise DataError(f"{self.folder}: image {complaint}")
        return read_image_file(self.folder / name)


def _hub_files(folder: Path) -> list[str]:
    """Where the hub's cache keeps the files of a snapshot, `snapshots/COMMIT`, which are links."""
    whole = Path(os.path.abspath(folder))
    return [
        os.path.realpath(above.parent / "blobs")
        for above in whole.parents
        if above.name == "snapshots" and (above.parent / "blobs").is_dir()
    ]


def read_image_file(path: Path) -> bytes:
    """Returns the bytes of a regular file of at most `MOST_IMAGE_BYTES`.

    Raises:
        OSError: It is missing or cannot be read, is no regular file, or is too large.
    """
    try:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a zero byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        if about.st_size > MOST_IMAGE_BYTES:
            text = f"it has {about.st_size:,} bytes, at most {MOST_IMAGE_BYTES:,} are read"
            raise OSError(errno.EFBIG, text, str(path))
        return file.read()


def is_file(folder: Path, name: str) -> bool:
    """Tells whether a folder has a file of a name that a listing gives.

    Raises:
        DataError: The folder cannot be looked at.
    """
    try:
        return (folder / name).is_file()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
            return False
        path = printable(str(folder / name))
        raise DataError(f"{path} cannot be looked at: {error.strerror}") from None
