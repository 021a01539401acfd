"""Random access to rows of tensors in thousands of safetensors files.

A row is read by one `preadv` straight into the batch: no map, no intermediate copy, no lock while
reading. (`safetensors`' own slices take longer, and copy once more; see
`benchmarks/results/cpu/data.csv`.) Descriptors are bounded, so the number of files is not; what a
file's header says is kept, so a file that is opened again is not parsed again.
"""

from __future__ import annotations

import math
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpo.errors import CacheError
from fastpo.system.json_text import parse_json
from fastpo.system.retry import retrying

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


MOST_HEADER_BYTES = 1 << 24
"""Of a part's file; a header has some hundred bytes for each latent shape, or for each prompt."""


class Checks(Protocol):
    """What looks at everything that is read; `fastpo.data.cache.checks.RowChecks` is one."""

    def header(self, name: str, header: bytes) -> None:
        """Looks at a file's header before it is parsed."""

    def row(self, name: str, key: str, row: int, parts: Sequence[memoryview]) -> None:
        """Looks at a row."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of one tensor stand in its file.

    Attributes:
        start: Place of the first row in bytes.
        count: Number of rows.
        shape: Shape of a row.
        dtype: Their dtype.
    """

    start: int
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """Reads rows of the tensors in one folder's safetensors files.

    Any number of threads may read at once. Each process opens its own files; a copy made by fork or
    pickle starts afresh.
    """

    def __init__(self, folder: Path, keep: int | None = None, checks: Checks | None = None) -> None:
        """Opens nothing yet.

        Args:
            folder: The folder.
            keep: Most files open at a time; by default half of what the process may open, 64 to
                4096.
            checks: Looks at everything that is read; None: nobody.
        """
        self._folder, self._checks = folder, checks
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._keep = keep or min(max(limit // 2, 64), 4096)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._open: OrderedDict[str, _File] = OrderedDict()
        self._headers: dict[str, dict[str, Rows]] = {}
        self._parsing: dict[str, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the open files out."""
        return {"folder": self._folder, "keep": self._keep, "checks": self._checks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts with no open file."""
        self.__init__(state["folder"], state["keep"], state["checks"])

    @property
    def open_files(self) -> int:
        """Files that are open now."""
        return len(self._open)

    def rows(self, name: str, key: str) -> Rows:
        """Returns where a tensor's rows are.

        Raises:
            CacheError: The file is damaged or lacks the tensor.
        """
        with self._damage(name, key):
            return self._header(name)[key]

    def keys(self, name: str) -> list[str]:
        """Returns the names of a file's tensors.

        Raises:
            CacheError: The file is missing or damaged.
        """
        with self._damage(name, "its header"):
            return sorted(self._header(name))

    def _header(self, name: str) -> dict[str, Rows]:
        if name not in self._headers:
            file = retrying(partial(self._file, name))
            with self._parsing.setdefault(name, threading.Lock()):  # once, however many ask
                if name not in self._headers:
                    raw = _raw_header(file.descriptor)
                    if self._checks is not None:
                        self._checks.header(name, raw)
                    size = os.fstat(file.descriptor).st_size
                    self._headers[name] = _parsed(raw, size)
        return self._headers[name]

    @contextmanager
    def _damage(self, name: str, what: str) -> Iterator[None]:
        """Says which file cannot be read."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{self._folder / name}: cannot read {what}: {type(error).__name__}: {error}"
            ) from error

    def read(self, name: str, key: str, row: int, parts: Sequence[memoryview]) -> None:
        """Reads one row into buffers that together have its size, one after the other.

        Args:
            name: The file.
            key: The tensor.
            row: The row.
            parts: Writable bytes, such as rows of `bytes_of` a tensor of the file's dtype.

        Raises:
            CacheError: The file is damaged, or lacks the tensor or the row.
        """
        rows = self.rows(name, key)
        try:
            if not 0 <= row < rows.count:
                raise ValueError(f"it has {rows.count} rows")
            if sum(part.nbytes for part in parts) != rows.size:
                raise ValueError(f"a row has {rows.size} bytes, {rows.shape} {rows.dtype}")
            retrying(partial(self._read, name, parts, rows.start + row * rows.size))
            if self._checks is not None:
                self._checks.row(name, key, row, parts)
        except (OSError, ValueError) as error:
            raise CacheError(f"{self._folder / name}: cannot read {key}[{row}]: {error}") from error

    def _read(self, name: str, parts: Sequence[memoryview], place: int) -> None:
        file = self._file(name)
        if os.preadv(file.descriptor, parts, place) != sum(part.nbytes for part in parts):
            _read_slowly(file, parts, place)

    def _file(self, name: str) -> _File:
        """Returns an open file; one that is let go stays open until its last reader is done."""
        if self._process != os.getpid():  # another thread of the parent may have held the lock
            self._process, self._open, self._lock = os.getpid(), OrderedDict(), threading.Lock()
            self._parsing = {}
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._open[name] = _File(self._folder / name)
                if len(self._open) > self._keep:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(name)
            return file


def bytes_of(tensor: Tensor) -> list[memoryview]:
    """Returns the bytes of each row of a contiguous tensor on the CPU, on the same memory."""
    rows = tensor.view(len(tensor), -1).view(torch.uint8).numpy().data
    flat, size = rows.cast("B"), rows.nbytes // len(tensor)
    return [flat[start : start + size] for start in range(0, rows.nbytes, size)]


class _File:
    """A descriptor that is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def header_of(path: Path) -> bytes:
    """Returns a safetensors file's header as it stands there, with the eight bytes of its length.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no safetensors file.
    """
    file = _File(path)
    return _raw_header(file.descriptor)


def _raw_header(descriptor: int) -> bytes:
    start = os.pread(descriptor, 8, 0)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > os.fstat(descriptor).st_size - 8:
        raise ValueError("no safetensors file")
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, at most {MOST_HEADER_BYTES:,} are read")
    return start + os.pread(descriptor, length, 8)


def _parsed(raw: bytes, size: int) -> dict[str, Rows]:
    """Parses a safetensors header: eight bytes of length, then JSON.

    Raises:
        ValueError: It is wrong, or the tensors do not fit into a file of this size.
    """
    found = {}
    entries = parse_json(raw[8:])
    if not isinstance(entries, dict):
        raise ValueError("no safetensors file")
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        count, *shape = entry["shape"]
        start, stop = (len(raw) + offset for offset in entry["data_offsets"])
        rows = Rows(start, count, tuple(shape), _DTYPES[entry["dtype"]])
        if min(count, *shape, 0) < 0 or start < len(raw):
            raise ValueError(f"{key} has a negative size or place")
        if stop - start != count * rows.size or stop > size:
            raise ValueError(f"{key} does not fit into the file")
        found[key] = rows
    return found


def _read_slowly(file: _File, views: Sequence[memoryview], place: int) -> None:
    """Reads part by part, where the system gave less than was asked for."""
    for view in views:
        done = 0
        while done < view.nbytes:
            got = os.preadv(file.descriptor, [view[done:]], place + done)
            if got == 0:
                raise ValueError("the file ends too early")
            done += got
        place += view.nbytes
