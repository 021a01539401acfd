"""The data path at scale: index, shuffle, resume, and random reads of SDXL-sized pairs.

    python benchmarks/bench_data.py [--rows 959040] [--pairs 1000000 10000000] [--folder DIR]

Every row is a ratio of medians of two things done turn by turn: ours and what it is held against.
They are timed in CPU time of the one thread that does them, with files in the page cache. Waiting
is timed in real time, so it needs idle cores. Memory is what the process holds privately, above
what it held before, without what allocators keep for later.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastpo.bench.measure import environment
from fastpo.bench.script import results_path
from fastpo.bench.table import write_records
from fastpo.config import DataConfig, parse_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.manifest import Manifest
from fastpo.data.loader import TimedIterator, make_loader, micro_batch_numbers
from fastpo.data.sampler import PairSampler
from fastpo.data.sources import open_source
from fastpo.testing import write_index, write_pickapic_columns

BATCH = 8
STEP = 0.2  # seconds: a quarter of what a GPU takes for eight SDXL pairs
TEXT = {"prompt_embeds": (77, 2048), "pooled": (1280,)}
PAIR_BYTES = 2 * (2 * 2 * 4 * 128 * 128 + 77 * 2048 + 1280)
Call = Callable[[], Any]


def turns(ours: Call, other: Call, runs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of CPU time of both, turn by turn."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(runs):
        for call, found in zip((ours, other), times, strict=True):
            began = time.thread_time()
            call()
            found.append(1e3 * (time.thread_time() - began))
    return times


def held(call: Call) -> tuple[Any, float]:
    """What a call returns, and the MiB that the process then holds privately."""
    before = _private()
    result = call()
    return result, (_private() - before) / 2**20


def _private() -> int:
    """Anonymous bytes in memory, once the allocators have given back what they kept."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def row(
    measure: str, pairs: int, against: str, times: tuple[list[float], list[float]], **more: object
) -> dict[str, object]:
    """One line of the CSV; `ratio` is ours over the other, `spread` that of single turns."""
    ours, other = (statistics.median(t) for t in times)
    single = sorted(a / b for a, b in zip(*times, strict=True))
    line = {
        "measure": measure,
        "pairs": pairs,
        "against": against,
        "ratio": round(ours / other, 3),
        "spread": f"{single[0]:.2f} to {single[-1]:.2f}",
        "ms": round(ours, 3),
        "private_mib": "",
        "note": "",
        "runs": len(single),
    }
    print(f"{measure:28s} {pairs:>11,}  {ours / other:7.2f} x {against}  {more or ''}", flush=True)
    return line | more


def index_rows(folder: Path, rows: int) -> Iterator[dict[str, object]]:
    """Labels and prompts of Pick-a-Pic, against pyarrow reading the same columns."""
    path = write_pickapic_columns(folder / "pickapic", rows, files=64, prompts=38_000)
    config = DataConfig(source="pickapic", path=str(path))
    files = sorted(path.glob("*.parquet"))

    def columns(*names: str) -> None:
        for file in files:
            pq.read_table(file, columns=list(names), use_threads=False)

    before = _bytes_read()
    source, mib = held(lambda: open_source(config))
    share = (_bytes_read() - before) / sum(f.stat().st_size for f in files)
    times = turns(
        lambda: open_source(config), lambda: columns("label_0", "label_1", "has_label"), 3
    )
    note = f"{100 * share:.0f} % of files with images of 1 byte"
    yield row(
        "index labels", rows, "pyarrow, 3 columns", times, private_mib=round(mib, 1), note=note
    )
    _, mib = held(source.prompt_table)
    times = turns(source.prompt_table, lambda: columns("caption"), 3)
    yield row("number prompts", rows, "pyarrow, 1 column", times, private_mib=round(mib, 1))
    names = lambda: list(source.pairs(rows // 2, rows // 2 + 1024))  # noqa: E731
    yield row("names of a shard's pairs", 1024, "first shard's",
              turns(names, lambda: list(source.pairs(0, 1024)), 5))  # fmt: skip


def order_rows(folder: Path, pairs: int) -> Iterator[dict[str, object]]:
    """Opening the index, an epoch's order, the middle of a run, a rank's share."""
    manifest = write_index(folder / str(pairs), pairs)
    values = np.random.default_rng(0).integers(0, 2**63, pairs)
    sort = lambda: np.argsort(values)  # noqa: E731
    runs = 7 if pairs < 5_000_000 else 3
    open_ = lambda: _opened(folder / str(pairs), manifest)  # noqa: E731
    cache, mib = held(open_)
    yield row("open cache index", pairs, "np.argsort of as many", turns(open_, sort, runs),
              private_mib=round(mib, 1))  # fmt: skip
    sampler, mib = held(lambda: _begun(cache, 0))
    epochs = iter(range(1, 10**6))
    per_epoch = sampler.micro_batches_per_epoch
    shuffle = lambda: sampler.micro_batch(next(epochs) * per_epoch)  # noqa: E731
    yield row("shuffle an epoch", pairs, "np.argsort of as many", turns(shuffle, sort, runs),
              private_mib=round(mib, 1), note="private_mib: the sampler with an epoch")  # fmt: skip
    late = per_epoch * 5 + per_epoch // 2
    times = turns(lambda: _begun(cache, late), lambda: _begun(cache, 0), runs)
    yield row("resume in the sixth epoch", pairs, "a start at 0", times)
    share = {"world_size": 64, "accumulation_steps": 1, "start_step": 0}
    numbers = micro_batch_numbers(rank=63, total_steps=per_epoch // 64, **share)
    all_of_it = lambda: [sampler.micro_batch(n) for n in numbers]  # noqa: E731
    times = turns(all_of_it, sort, runs)
    note = f"{len(numbers)} micro-batches of 4"
    yield row("indices of 1 of 64 ranks", pairs, "np.argsort of as many", times, note=note)
    yield _boundary(sampler, pairs)


class _Nothing:
    """A cache from which reading takes no time."""

    def read(self, indices: Any, visit: int) -> Any:
        """Returns the visit."""
        return visit


def _boundary(sampler: PairSampler, pairs: int) -> dict[str, object]:
    """The longest wait where an epoch begins, with threads that draw ahead and without."""
    times: tuple[list[float], list[float]] = [], []
    per_epoch = sampler.micro_batches_per_epoch
    for epoch in range(1, 4):
        for workers, found in zip((2, 0), times, strict=True):
            sampler.micro_batch(epoch * per_epoch - 1)
            steps = {"start_step": epoch * per_epoch - 20, "total_steps": epoch * per_epoch + 2}
            with TimedIterator(
                make_loader(_Nothing(), sampler, workers=workers, **steps)
            ) as batches:
                waits = []
                for _ in batches:
                    waits.append(1e3 * batches.taken())
                    time.sleep(STEP)
            found.append(max(waits[1:]))
    return row("longest wait, new epoch", pairs, "drawn when asked for", times)


def _opened(folder: Path, manifest: Manifest) -> PairCache:
    raw = {
        "model": {"path": "unused"},
        "data": {"source": "pickapic", "path": "unused"},
        "prepare": {"cache_dir": str(folder)},
        "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
    }
    return PairCache(folder, manifest, parse_config(raw))


def _begun(cache: PairCache, number: int) -> PairSampler:
    sampler = PairSampler(cache.bucket, 4, seed=0)
    sampler.micro_batch(number)
    return sampler


def read_rows(folder: Path, shards: int, size: int, waits: int) -> Iterator[dict[str, object]]:
    """Random batches of SDXL pairs, from the page cache: against a sequential read of as much."""
    pairs = shards * size
    manifest = write_index(folder / "read", pairs, shard_size=size, prompts=size)
    manifest.shapes = [(128, 128)] * 9
    for k in range(shards):
        where = folder / "read" / f"shard-{k:05d}"
        where.mkdir()
        save_file(
            {"128x128": torch.randn(size, 2, 2, 4, 128, 128).half()}, where / "latents.safetensors"
        )
    (folder / "read" / "text-00000").mkdir()
    text = {name: torch.randn(size, *shape).half() for name, shape in TEXT.items()}
    save_file(text, folder / "read" / "text-00000" / "text.safetensors")
    cache = _opened(folder / "read", manifest)
    cache.bucket.zero_()
    order = np.random.default_rng(0)
    batch = lambda: cache.read(order.choice(pairs, BATCH, replace=False).tolist(), 0)  # noqa: E731
    sequential = _sequential(folder / "read" / "shard-00000" / "latents.safetensors")
    slices = _slices(folder / "read", shards, size, order)
    for call in (batch, sequential, slices):
        call()
    note = f"{BATCH * PAIR_BYTES / 1e6:.1f} MB"
    yield row("read a batch", BATCH, "sequential read of as much", turns(batch, sequential, 100),
              note=note)  # fmt: skip
    yield row("read a batch", BATCH, "safetensors slices", turns(batch, slices, 100), note=note)
    yield _waiting(cache, pairs, waits)


def _sequential(path: Path) -> Call:
    buffer, size = bytearray(BATCH * PAIR_BYTES), path.stat().st_size
    places = iter(range(10**9))

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(next(places) * len(buffer) % (size - len(buffer)))
            file.readinto(buffer)

    return read


def _slices(folder: Path, shards: int, size: int, order: np.random.Generator) -> Call:
    """The same rows through `safe_open(...).get_slice`, stacked."""
    names = [folder / f"shard-{k:05d}" / "latents.safetensors" for k in range(shards)]
    files = [safe_open(name, framework="pt") for name in names]
    text = safe_open(folder / "text-00000" / "text.safetensors", framework="pt")

    def read() -> None:
        chosen = order.choice(shards * size, BATCH, replace=False).tolist()
        rows = [files[i // size].get_slice("128x128")[i % size : i % size + 1] for i in chosen]
        latents = torch.cat(rows).permute(1, 2, 0, 3, 4, 5)
        latents[0].flatten(0, 1), latents[1].flatten(0, 1)
        for name in TEXT:
            slices = text.get_slice(name)
            torch.cat([slices[i % size : i % size + 1] for i in chosen])

    return read


def _waiting(cache: PairCache, pairs: int, waits: int) -> dict[str, object]:
    """Waiting for a batch while training sleeps, read ahead by two threads or not at all."""
    sampler = PairSampler(torch.zeros(pairs, dtype=torch.int64), BATCH, seed=0)

    def wait(workers: int) -> list[float]:
        found = []
        with TimedIterator(
            make_loader(cache, sampler, total_steps=200, workers=workers)
        ) as batches:
            for _ in range(waits):
                time.sleep(STEP)
                next(batches)
                found.append(1e3 * batches.taken())
        return found

    times = wait(2), wait(0)
    first, *steady = times[0]
    wait_ms = statistics.mean(steady)
    share = wait_ms / (1e3 * STEP + wait_ms)
    note = f"mean: {100 * share:.2f} % of steps of {STEP:g} s; the first batch: {first:.1f} ms"
    return row("wait, 2 reading threads", BATCH, "wait without", (steady, times[1][1:]), note=note)


def main() -> None:
    """Runs all of it and writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=959_040)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--shards", type=int, default=8, help="of 64 pairs, 33 MB each")
    parser.add_argument("--waits", type=int, default=61, help="steps that wait for a batch")
    parser.add_argument("--out", type=Path, help="CSV file; default: results/<device>/data.csv")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows += read_rows(folder, options.shards, 64, options.waits)
        rows += index_rows(folder, options.rows)
        for pairs in options.pairs:
            rows += order_rows(folder, pairs)
    where = environment()
    known = {key: where[key] for key in ("device", "torch", "commit", "date") if key in where}
    path = options.out or results_path("data")
    rows = [{**row, "cores": os.cpu_count(), **known} for row in rows]
    write_records(rows, list(rows[0]), path)
    print(path)


if __name__ == "__main__":
    main()
