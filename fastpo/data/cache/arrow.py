"""The Arrow files of a cache: one record batch each, mapped, not loaded."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import overload

import pyarrow as pa
import torch
from torch import Tensor

from fastpo.data.cache.manifest import REMAKE, FileRecord, write_recorded
from fastpo.errors import CacheError, one_line


class Texts(Sequence[str]):
    """Many texts, decoded when they are asked for; equal to any sequence of the same texts."""

    def __init__(self, array: pa.Array) -> None:
        """Wraps an Arrow array of strings."""
        self._array = array

    def __len__(self) -> int:
        """Returns the number of texts."""
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Returns one text, or a list of those of a slice."""
        if isinstance(index, slice):
            return self._array[index].to_pylist()
        return self._array[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        """Decodes some thousand texts at a time."""
        step = 8192
        parts = (self._array[i : i + step].to_pylist() for i in range(0, len(self), step))
        return chain.from_iterable(parts)

    def __eq__(self, other: object) -> bool:
        """Compares text by text."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def open_arrow(path: Path) -> pa.RecordBatch:
    """Maps a file of one record batch.

    The pages are private: who writes into a tensor made of them changes no file.

    Raises:
        CacheError: It is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(pages))).get_batch(0)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CacheError(f"{path} is damaged: {one_line(error)}; {REMAKE}") from error


def column(batch: pa.RecordBatch, name: str) -> Tensor:
    """Returns a column of numbers as a tensor on the same memory."""
    return torch.from_dlpack(batch.column(name))


def rows_of(batch: pa.RecordBatch, name: str) -> Tensor:
    """Returns a column of lists of equal length as a tensor `(rows, length)` on the same memory."""
    lists = batch.column(name)
    return torch.from_dlpack(lists.flatten()).view(-1, lists.type.list_size)


def write_arrow(path: Path, batch: pa.RecordBatch) -> FileRecord:
    """Writes a file that `open_arrow` maps, whole or not at all."""

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as file:
            file.write_batch(batch)

    return write_recorded(path, write)
