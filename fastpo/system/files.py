"""The durable write: a file or folder is there whole or not at all, even after a power cut.

Every write goes the same way: a temporary name beside the target, the content, a flush of each file
to disk, one rename, a flush of the folder that holds the name. All temporaries of killed processes
carry one kind of name, which `sweep` knows.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from fastpo.errors import StorageError
from fastpo.system.json_text import finite
from fastpo.system.storage import explain

Step = Literal["make", "flush", "rename", "remove", "append"]

# `.NAME.partial-HOST+PID+NUMBER` while it is written, `.NAME.old-...` while it is replaced. The
# names of earlier versions, `.NAME.partial-HOST-PID` and `.NAME.old-PID`, are known too.
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>partial|old)-"
    r"(?:(?P<host>[^+]+)\+(?P<pid>\d+)\+\d+|(?:[^+]+-)?\d{1,7})",
    re.DOTALL,
)
_numbers = itertools.count()
_umask = os.umask(0o077)
os.umask(_umask)
_in_progress: set[str] = set()


def _commit(step: Step, path: Path) -> None:
    """Is called before each step that changes what the disk holds for good.

    Does nothing: tests put a function here that counts the steps, or ends the process at one.
    """


@contextmanager
def _naming(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes a refusal of the system a `StorageError` that names what the user knows.

    Args:
        target: What was to be written.
        temporary: Its name until then, of which the user knows nothing.
    """
    try:
        yield
    except Exception as error:
        told = error if isinstance(error, StorageError) else explain(error, target, anything=False)
        if told is None:
            if temporary is not None and isinstance(error, OSError) and error.filename:
                named = os.fsdecode(error.filename)
                error.filename = named.replace(str(temporary), str(target))
            raise
        text = str(told) if temporary is None else str(told).replace(str(temporary), str(target))
        if text == str(error):
            raise
        raise StorageError(text, told.errno) from error


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside `target` that takes its place if the block ends well.

    Raises:
        StorageError: It cannot be written; `target` is as it was.
    """
    temporary = _temporary(target, "partial")
    _in_progress.add(temporary.name)
    try:
        with _naming(target, temporary):
            yield temporary
            _open_to_readers(temporary)
            flush(temporary)
            _rename(temporary, target)
    finally:
        with suppress(OSError):  # the place is read-only, or gone
            temporary.unlink(missing_ok=True)
        _in_progress.discard(temporary.name)


def listing(folder: Path) -> str:
    """Names what a folder holds, for error messages."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


@contextmanager
def whole_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Gives a fresh temporary folder that takes `target`'s place if the block ends well.

    Args:
        target: The folder to make; missing parents are made too.
        replace: Takes the place of an existing folder. False leaves one that is not empty.

    Raises:
        StorageError: It cannot be written; `target` is as it was.
        OSError: `target` stays as `replace` says.
    """
    make_folder(target.parent)
    temporary = _temporary(target, "partial")
    _in_progress.add(temporary.name)
    try:
        with _naming(target, temporary):
            temporary.mkdir()
            yield temporary
            if replace:
                replace_folder(temporary, target)
            else:
                _flush_tree(temporary)
                _rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _in_progress.discard(temporary.name)


def replace_folder(new: Path, target: Path) -> None:
    """Moves the folder `new` into `target`'s place, with everything in it flushed to disk.

    `target` is gone for no longer than two renames take; after a kill between them `sweep` puts its
    old content back.
    """
    _flush_tree(new)
    old = _temporary(target, "old")
    _in_progress.add(old.name)
    try:
        if target.exists():
            _commit("rename", target)
            target.rename(old)
        _rename(new, target)
    finally:
        if old.exists():
            if target.exists():
                _commit("remove", old)
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(target)
        _in_progress.discard(old.name)


def write_bytes(target: Path, content: bytes) -> None:
    """Writes a file."""
    with whole_file(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: Path, text: str) -> None:
    """Writes a text file in UTF-8, line ends as they are."""
    write_bytes(target, text.encode("utf-8"))


def write_json(target: Path, value: Any) -> None:
    """Writes a JSON file, indented by one blank; null where a number is not finite."""
    write_text(target, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Appends to a text file; survives a kill, and a power cut after the next `flush`."""
    with _naming(path):
        _commit("append", path)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def flush(path: Path) -> None:
    """Waits until the disk holds a file's content, or a folder's names."""
    with _naming(path):
        _commit("flush", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some network file systems flush no folders
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and its missing parents.

    Raises:
        StorageError: It cannot be made.
        FileExistsError: A file has its name.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    with _naming(path):
        _commit("make", path)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def user_path(text: str | Path) -> Path:
    """Returns the path that a user names; `~` is the home, and of an unknown user a mere name."""
    return Path(os.path.expanduser(text))  # `Path.expanduser` raises a RuntimeError for that user


def check_folder(path: Path) -> None:
    """Refuses, before any work, a folder that cannot be made or written in; makes nothing.

    Raises:
        StorageError: A part of its path is no folder, or this user may not write there.
    """
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        number, named = errno.ENOTDIR, path
    elif not os.access(place, os.W_OK | os.X_OK):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        number, named = errno.EROFS if read_only else errno.EACCES, place
    else:
        return
    told = explain(OSError(number, os.strerror(number)), named)
    assert told is not None
    raise told


def move(old: Path, new: Path) -> None:
    """Renames a file or folder, or a link itself, within one file system.

    Raises:
        OSError: It cannot be renamed, or `new` is there and not an empty folder or a file.
    """
    _rename(old, new)
    flush(old.parent)


def remove(path: Path) -> None:
    """Removes a file or folder, if it exists; a folder's name is gone before its first file."""
    if not path.is_dir() or path.is_symlink():
        _commit("remove", path)
        path.unlink(missing_ok=True)
        return
    temporary = _temporary(path, "partial")
    _commit("remove", path)
    path.rename(temporary)
    shutil.rmtree(temporary)


def sweep(folder: Path, *, sole_writer: bool = False) -> None:
    """Removes from `folder` the temporaries of processes that were killed.

    A folder that was killed between the two renames of `replace_folder` gets its old content back.
    Temporaries of processes that are alive on this host stay.

    Args:
        folder: Where to look, not below it.
        sole_writer: No other process writes here, so that temporaries of other hosts and those of
            versions that did not name the host are nobody's; otherwise they stay.
    """
    found = [(path, _TEMPORARY.fullmatch(path.name)) for path in folder.glob(".*")]
    dead = [
        (path, match) for path, match in found if match and not _is_used(path, match, sole_writer)
    ]
    replaced = [(path, match["name"]) for path, match in dead if match["kind"] == "old"]
    for path, name in sorted(replaced, key=lambda found: -found[0].stat().st_ctime_ns):
        if not (folder / name).exists():
            _rename(path, folder / name)
    for path, _ in dead:
        _commit("remove", path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file's or folder's name is one under which something is written or replaced."""
    return _TEMPORARY.fullmatch(name) is not None


def _temporary(target: Path, kind: Literal["partial", "old"]) -> Path:
    """A name beside `target` that no other process, host or call uses."""
    owner = f"{socket.gethostname()}+{os.getpid()}+{next(_numbers)}"
    return target.with_name(f".{target.name}.{kind}-{owner}")


def _is_used(path: Path, match: re.Match[str], sole_writer: bool) -> bool:
    if match["host"] != socket.gethostname():
        return not sole_writer
    if int(match["pid"]) == os.getpid():  # another container's process may have had this number
        return path.name in _in_progress
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            _open_to_readers(Path(place, name))
            flush(Path(place, name))
        flush(Path(place))


def _open_to_readers(path: Path) -> None:
    """Gives a new file the permissions that the process's umask leaves to files.

    safetensors writes files that nobody but their owner can read, on a shared disk too.
    """
    status = path.lstat()
    if stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600:
        path.chmod(0o666 & ~_umask)


def _rename(old: Path, new: Path) -> None:
    _commit("rename", new)
    os.replace(old, new)
    flush(new.parent)
