"""Layout of the cache's files: what one shard writes, and random access to all of them.

Shard k consists of four files:

- `latents-k.safetensors`: per latent shape `h`x`w` two tensors `hxw.mean` and `hxw.logvar` of
  `(pairs, 2, C, h, w)`, the side that the source calls the winner first.
- `text-k.safetensors`: `prompt_embeds` `(prompts, L, D)` and, for SDXL, `pooled` `(prompts, P)` of
  the prompts that occur here for the first time.
- `prompts-k.parquet`: their text, in the same order. Prompts are numbered through all shards;
  number 0 is the empty prompt.
- `index-k.parquet`: one row per pair, see `INDEX_SCHEMA`.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastpo.data.manifest import FileRecord, write_atomically
from fastpo.errors import CacheError

INDEX_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("pair_key", pa.int64()),
        ("position", pa.int64()),  # in the source, pairs in quarantine included
        ("prompt", pa.int64()),  # number of the prompt
        ("height", pa.int32()),  # of the latent
        ("width", pa.int32()),
        ("slot", pa.int64()),  # row in the latent tensors of this shape and shard
        ("add_time_ids", pa.list_(pa.float32(), 6)),
    ]
)
PROMPT_SCHEMA = pa.schema([("prompt", pa.string())])


def latents_name(shard: int) -> str:
    """Returns the file name of a shard's latents."""
    return f"latents-{shard:05d}.safetensors"


def text_name(shard: int) -> str:
    """Returns the file name of a shard's text embeddings."""
    return f"text-{shard:05d}.safetensors"


def index_name(shard: int) -> str:
    """Returns the file name of a shard's index."""
    return f"index-{shard:05d}.parquet"


def prompts_name(shard: int) -> str:
    """Returns the file name of a shard's new prompts."""
    return f"prompts-{shard:05d}.parquet"


def write_shard(
    cache_dir: Path,
    shard: int,
    *,
    latents: dict[str, Tensor],
    text: dict[str, Tensor],
    prompts: Sequence[str],
    rows: Sequence[dict[str, Any]],
) -> dict[str, FileRecord]:
    """Writes the four files, each under a temporary name first.

    Args:
        cache_dir: Folder of the cache.
        shard: Number of the shard.
        latents: By `hxw.mean` and `hxw.logvar`.
        text: `prompt_embeds` and perhaps `pooled`; empty without new prompts.
        prompts: Texts of the new prompts.
        rows: Index rows by the names of `INDEX_SCHEMA`.

    Returns:
        The files by name.
    """
    index = pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA)
    texts = pa.Table.from_pylist([{"prompt": p} for p in prompts], schema=PROMPT_SCHEMA)
    writers = {
        latents_name(shard): lambda path: save_file(latents, path),
        text_name(shard): lambda path: save_file(text, path),
        prompts_name(shard): lambda path: pq.write_table(texts, path),
        index_name(shard): lambda path: pq.write_table(index, path),
    }
    return {name: write_atomically(cache_dir / name, write) for name, write in writers.items()}


def read_table(cache_dir: Path, names: Sequence[str]) -> pa.Table:
    """Reads parquet files of one kind as one table.

    Raises:
        CacheError: A file is damaged.
    """
    tables = []
    for name in names:
        try:
            tables.append(pq.read_table(cache_dir / name, use_threads=False))
        except (OSError, pa.ArrowException) as error:
            raise CacheError(f"{cache_dir / name} is damaged: {error}") from error
    return pa.concat_tables(tables).combine_chunks()


class TensorFiles:
    """Memory-mapped safetensors files of one folder; the least used are let go.

    Each process opens its own; a copy made by fork or pickle starts afresh.
    """

    def __init__(self, folder: Path, keep: int = 4096) -> None:
        """Maps nothing yet; at most `keep` files are mapped at a time (none keeps a descriptor)."""
        self._folder = folder
        self._keep = keep
        self._process = os.getpid()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the open files out."""
        return {"_folder": self._folder, "_keep": self._keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts with no open file."""
        self.__init__(state["_folder"], state["_keep"])

    def row(self, name: str, key: str, row: int) -> Tensor:
        """Returns one row of a tensor, `tensor[row]`, in its stored dtype.

        Raises:
            CacheError: The file is damaged or lacks the tensor.
        """
        try:
            return self._file(name).get_slice(key)[row : row + 1][0]
        except Exception as error:  # safetensors raises its own type, IndexError or OSError
            raise CacheError(f"{self._folder / name}: cannot read {key}[{row}]: {error}") from error

    def keys(self, name: str) -> list[str]:
        """Returns the names of a file's tensors."""
        return list(self._file(name).keys())

    def _file(self, name: str) -> Any:
        if self._process != os.getpid():
            self._process, self._open = os.getpid(), OrderedDict()
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        handle = safe_open(self._folder / name, framework="pt")
        self._open[name] = handle
        if len(self._open) > self._keep:
            self._open.popitem(last=False)
        return handle
