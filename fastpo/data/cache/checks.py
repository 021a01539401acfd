"""Whether what is read of a cache is what was written, checked where it is read.

Beside each file of tensors stands `rows.json`: the XXH3 of the file's header and of each row. A row
is checked when it is first read (`data.verify: first`), so that neither a wrong bit passes nor is
more of a shard read than is used: hashing the 512 KB of an SDXL pair takes 0.05 ms of a reading
thread. A part of before there was a `rows.json` is hashed whole when its first row is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from fastpo.config.data import Verify
from fastpo.data.cache.manifest import (
    MOST_BYTES,
    REMAKE,
    FileRecord,
    Record,
    damage_of,
)
from fastpo.data.cache.tensors import bytes_of, header_of
from fastpo.errors import CacheError, one_line
from fastpo.system.json_text import read_json, seal, unseal

ROWS = "rows.json"


class RowSums(Record):
    """What stands in a part's `rows.json`.

    Attributes:
        header: XXH3 of the file's header, 64 bits as 16 hexadecimal digits.
        rows: The same of each tensor's rows, one after the other, by the tensor's name.
    """

    header: str
    rows: dict[str, str]


def rows_text(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Returns the text of `rows.json`: of the tensors in memory, and of the header on disk.

    Args:
        path: The safetensors file that was written of them.
        tensors: The tensors, contiguous and on the CPU.
    """
    rows = {
        key: "".join(xxhash.xxh3_64_hexdigest(row) for row in bytes_of(tensor))
        for key, tensor in tensors.items()
    }
    header = xxhash.xxh3_64_hexdigest(header_of(path))
    return seal(RowSums(header=header, rows=rows).model_dump(mode="json"))


class RowChecks:
    """Checks the rows that a process reads of a cache; any number of threads may ask."""

    def __init__(self, folder: Path, files: Mapping[str, FileRecord], verify: Verify) -> None:
        """Reads nothing yet.

        Args:
            folder: The cache's folder.
            files: Its files, by their path in it, those beside the content too.
            verify: `first` checks a row once, `always` at each reading, `never` not at all.
        """
        self._made_of = folder, files, verify
        self._folder, self._files, self._verify = folder, files, verify
        self._sums: dict[str, dict[str, np.ndarray] | None] = {}
        self._seen: dict[tuple[str, str], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what was checked: a copy checks for itself."""
        return {"made_of": self._made_of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts with nothing checked."""
        self.__init__(*state["made_of"])

    def header(self, name: str, header: bytes) -> None:
        """Checks a file's header; call it before the header is parsed, and before `row`.

        Raises:
            CacheError: It, or `rows.json` beside it, is damaged.
        """
        if self._verify == "never":
            return
        path = self._folder / name
        beside = path.with_name(ROWS)
        self._check_whole(str(beside.relative_to(self._folder)))
        try:
            raw = unseal(read_json(beside, most_bytes=MOST_BYTES))
            sums = RowSums.model_validate(raw)
            rows = {key: np.frombuffer(bytes.fromhex(s), ">u8") for key, s in sums.rows.items()}
        except FileNotFoundError:
            self._sums[name] = None
            self._check_whole(name)
            return
        except (OSError, ValueError) as error:
            raise CacheError(f"{beside} is damaged ({one_line(error)}); {REMAKE}") from None
        if xxhash.xxh3_64_hexdigest(header) != sums.header:
            raise CacheError(f"{path} is damaged: its header is not as it was written; {REMAKE}")
        self._sums[name] = rows

    def row(self, name: str, key: str, row: int, parts: Sequence[memoryview]) -> None:
        """Checks a row that was just read.

        Raises:
            CacheError: It is not what was written.
        """
        sums = self._sums.get(name)
        if sums is None:
            return
        seen = self._seen.get((name, key))
        if seen is None:
            seen = self._seen.setdefault((name, key), np.zeros(len(sums[key]), dtype=bool))
        if seen[row] and self._verify == "first":
            return
        found = xxhash.xxh3_64()
        for part in parts:
            found.update(part)
        if found.intdigest() != int(sums[key][row]):
            raise CacheError(
                f"{self._folder / name} is damaged: {key}[{row}] has XXH3 {found.hexdigest()}, "
                f"expected {int(sums[key][row]):016x}; {REMAKE}"
            )
        seen[row] = True

    def _check_whole(self, name: str) -> None:
        """Checks a whole file, if the manifest knows it."""
        if name in self._files and (
            what := damage_of(self._folder / name, self._files[name], content=True)
        ):
            raise CacheError(f"{what}; {REMAKE}")
