"""The parts of a cache: each a folder that appears on disk in one rename, or not at all.

- `shard-k` holds `latents.safetensors`: per latent shape one tensor `hxw` of
  `(pairs, 2, 2, C, h, w)`: mean and log-variance, each of the side that the source calls the winner
  and of the other, so that a pair is one stretch of bytes; and `index.parquet`, see `INDEX_SCHEMA`.
- `image-k`, of edits alone: see `fastpo.data.cache.source_images`.
- `text-k` holds `text.safetensors`: the conditions that prompts give, each `(prompts, ...)`, under
  the names of the model's family, or without their padding (see `fastpo.data.cache.texts`); and
  `prompts.parquet`, their text in the same order.

All hold `rows.json`, the checksums of the tensors' rows (see `fastpo.data.cache.checks`), and
`record.json`: the files' sizes and hashes, and the pairs in quarantine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import Tensor

from fastpo.data.cache.checks import rows_text
from fastpo.data.cache.manifest import (
    MOST_BYTES,
    REMAKE,
    FileRecord,
    Manifest,
    Quarantined,
    Range,
    Record,
    damage_of,
    file_record,
)
from fastpo.errors import CacheError, one_line
from fastpo.system import ownership
from fastpo.system.files import whole_folder
from fastpo.system.json_text import read_json, seal, unseal

INDEX_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),  # as the source gives it
        ("position", pa.int64()),  # in the source, pairs in quarantine included
        ("prompt", pa.int32()),  # number of the prompt
        ("height", pa.int32()),  # of the latent
        ("width", pa.int32()),
        ("slot", pa.int32()),  # row in the latent tensor of this shape and shard
        ("add_time_ids", pa.list_(pa.float32(), 6)),
    ]
)
WEIGHT = "pair_weight"
WEIGHT_TYPE = pa.float32()  # null counts as 1; a shard of which no pair has one lacks the column
SOURCE_IMAGE = "source_image"
SOURCE_IMAGE_TYPE = pa.int32()  # number of the image that an edit begins from; only of edits
MORE_SOURCES = "more_sources"
MORE_SOURCES_TYPE = pa.list_(pa.int32())  # the next ones; lacking where no pair has any
PROMPT_SCHEMA = pa.schema([("prompt", pa.string())])
LATENTS, INDEX = "latents.safetensors", "index.parquet"
TEXT, PROMPTS = "text.safetensors", "prompts.parquet"
RECORD = "record.json"
# The record is a part's marker; one that lost it is known by the names of its files.
PART = ownership.Kind(
    "a part of a cache",
    r"(record|rows)\.json|(latents|text)\.safetensors|(index|prompts)\.parquet",
    lambda folder: not ownership.strangers(folder, PART),
)

Kind = Literal["shard", "text", "image"]
_FIRST_IMAGE_LOCK = 1 << 40
DIGITS = 16
"""Hexadecimal digits of a digest of `PartRecord.contents` and `images`."""


class PartRecord(Record):
    """What stands in a part's `record.json`.

    Attributes:
        span: What it covers.
        files: Its other files by name.
        quarantined: Position in the source of each pair left out, and why; of texts and source
            images the numbers of those whose image could not be read.
        contents: Of a shard, the digests of its pairs in the source one after the other; see
            `fastpo.data.prepare.verify_source`. Of source images those of the images.
        images: The same of each pair's winner and loser; empty in caches of before it was kept.
        cut: Of a text, how many prompts are longer than what was encoded of them.
    """

    span: Range
    files: dict[str, FileRecord]
    quarantined: dict[int, Quarantined]
    contents: str = ""
    images: str = ""
    cut: int = 0


@dataclass(frozen=True)
class Digests:
    """What a shard was made from, as text of hexadecimal digits, `DIGITS` for each thing.

    Attributes:
        contents: Of each pair its name, prompt and images; or of each source image its bytes.
        images: Of each pair its winner, and its loser.
    """

    contents: str = ""
    images: str = ""


@dataclass(frozen=True)
class CachePart:
    """One part of a cache.

    Attributes:
        kind: `shard`, `text` or `image`.
        number: Its number among its kind.
        span: What it covers.
    """

    kind: Kind
    number: int
    span: Range

    @property
    def name(self) -> str:
        """Name of its folder."""
        return part_name(self.kind, self.number)

    @property
    def lock_number(self) -> int:
        """Number of its lock: even for shards, odd for texts, beyond all of them for images."""
        if self.kind == "image":
            return _FIRST_IMAGE_LOCK + self.number
        return 2 * self.number + (self.kind == "text")

    def done(self, folder: Path) -> bool:
        """Tells whether it stands in a cache folder."""
        return (folder / self.name / RECORD).is_file()

    def write(
        self,
        folder: Path,
        writers: Mapping[str, Callable[[Path], Any]],
        quarantined: Mapping[int, Quarantined] | None = None,
        digests: Digests | None = None,
        cut: int = 0,
    ) -> None:
        """Writes the files beside the cache's and puts all of them in place by one rename.

        If another process was faster, its files stay.
        """
        try:
            with whole_folder(folder / self.name, replace=False) as temporary:
                files = {}
                for name, write in writers.items():
                    write(temporary / name)
                    files[name] = file_record(temporary / name)
                record = PartRecord(
                    span=self.span,
                    files=files,
                    quarantined=dict(quarantined or {}),
                    contents=digests.contents if digests else "",
                    images=digests.images if digests else "",
                    cut=cut,
                )
                (temporary / RECORD).write_text(seal(record.model_dump(mode="json")))
        except OSError:
            if not self.done(folder):
                raise

    def record(self, folder: Path) -> PartRecord:
        """Reads its record.

        Raises:
            CacheError: It is damaged or of another plan.
        """
        path = folder / self.name / RECORD
        try:
            raw = unseal(read_json(path, most_bytes=MOST_BYTES))
            record = PartRecord.model_validate(raw)
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged ({one_line(error)}); {REMAKE}") from None
        if record.span != self.span:
            raise CacheError(
                f"{path} covers {record.span.start} to {record.span.stop}, the manifest says "
                f"{self.span.start} to {self.span.stop}; delete {path.parent}"
            )
        return record

    def table(self, folder: Path, name: str) -> pa.Table:
        """Reads one of its parquet files, once its checksum was found to be as recorded.

        Raises:
            CacheError: It is damaged.
        """
        path = folder / self.name / name
        recorded = self.record(folder).files
        what = damage_of(path, recorded[name], content=True) if name in recorded else "no record"
        try:
            if what is None:
                return pq.read_table(path, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            what = f"{path} is damaged: {one_line(error)}"
        raise CacheError(f"{what}; {REMAKE}")


def part_name(kind: Kind, number: int) -> str:
    """Returns the name of a part's folder."""
    return f"{kind}-{number:05d}"


def parts_of(manifest: Manifest) -> list[CachePart]:
    """Returns the plan's parts: the texts, the source images, then the shards."""
    texts = [CachePart("text", k, span) for k, span in enumerate(manifest.texts)]
    images = [CachePart("image", k, span) for k, span in enumerate(manifest.images)]
    shards = [CachePart("shard", k, span) for k, span in enumerate(manifest.shards)]
    return texts + images + shards


def first_part(folder: Path) -> Path | None:
    """Returns a part that stands in a cache folder, whatever its manifest says; None: no part."""
    return next((one for kind in get_args(Kind) for one in folder.glob(f"{kind}-*")), None)


def tensor_writer(tensors: dict[str, Tensor]) -> Callable[[Path], Any]:
    """Returns what writes tensors as safetensors."""
    return lambda path: save_file(tensors, path)


def rows_writer(name: str, tensors: dict[str, Tensor]) -> Callable[[Path], Any]:
    """Returns what writes the rows' checksums of the file `name`, which is written before."""
    return lambda path: path.write_text(rows_text(path.with_name(name), tensors))


def table_writer(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> Callable[[Path], Any]:
    """Returns what writes rows as parquet."""
    return lambda path: pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def index_schema(rows: Sequence[dict[str, Any]], *, edits: bool = False) -> pa.Schema:
    """Returns the schema of a shard's index.

    Args:
        rows: Its rows; the pairs' weights are among the columns where any has one.
        edits: Whether the pairs begin from source images.
    """
    schema = INDEX_SCHEMA
    if any(row[WEIGHT] is not None for row in rows):
        schema = schema.append(pa.field(WEIGHT, WEIGHT_TYPE))
    if edits:
        schema = schema.append(pa.field(SOURCE_IMAGE, SOURCE_IMAGE_TYPE))
    if any(row[MORE_SOURCES] for row in rows):
        schema = schema.append(pa.field(MORE_SOURCES, MORE_SOURCES_TYPE))
    return schema


def finished_parts(folder: Path, manifest: Manifest) -> int:
    """Counts the parts that are done."""
    return sum(part.done(folder) for part in parts_of(manifest))
