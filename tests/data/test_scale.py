"""A million pairs: indexed from columns, opened without being loaded, shuffled, resumed, shared."""

import gc
import itertools
import pickle
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpo.config import DataConfig, parse_config
from fastpo.data.cache import PairCache
from fastpo.data.loader import micro_batch_numbers
from fastpo.data.sampler import PairSampler
from fastpo.data.sources import open_source
from fastpo.testing import write_index, write_pickapic_columns

MILLION = 1_000_000
PICKAPIC_ROWS = 959_040


def fastest(call, runs=3):
    def once():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return min(once() for _ in range(runs))


def bytes_read():
    """What this process asked the system to read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def pickapic(path):
    return open_source(DataConfig(source="pickapic", path=str(path)))


def test_indexing_reads_no_image_byte(tmp_path):
    """Images of 64 KiB of noise: the index costs a hundredth of the files."""
    noise = np.random.default_rng(0).bytes(2**16)
    write_pickapic_columns(tmp_path, 600, files=3, prompts=9, group_size=50, image=noise)
    # Equal images would be stored once: make the column as large as real ones are.
    size = rewrite_without_dictionary(tmp_path)
    before = bytes_read()
    source = pickapic(tmp_path)
    table = source.prompt_table()
    names = [pair.pair_id for pair in source.pairs(100, 300)]
    assert len(names) == 200
    assert len(table.prompts) == 10
    assert source.images.reads == 0
    assert bytes_read() - before < size / 100
    before = bytes_read()
    pair = next(source.pairs(300, 301))
    assert pair.winner() == pair.loser() == noise
    assert source.images.reads == 1
    assert 50 * 2**17 <= bytes_read() - before < 1.1 * 50 * 2**17, "one row group"


def rewrite_without_dictionary(folder):
    import pyarrow.parquet as pq

    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(
            table, path, row_group_size=50, use_dictionary=["caption"], compression="none"
        )
    return sum(path.stat().st_size for path in folder.glob("*.parquet"))


@pytest.mark.slow
def test_pickapic_in_full_is_indexed_in_seconds(tmp_path):
    write_pickapic_columns(tmp_path, PICKAPIC_ROWS, files=64, prompts=38_000)
    tracemalloc.start()
    began = time.perf_counter()
    source = pickapic(tmp_path)
    table = source.prompt_table()
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.report.rows == PICKAPIC_ROWS // 64 * 64
    assert len(source) == len(table.numbers) == source.report.rows - source.report.ties
    assert len(table.prompts) == 38_001
    assert seconds < 120
    assert peak < 64 * 2**20, f"{peak / len(source):.0f} bytes a pair"


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    folder = tmp_path_factory.mktemp("million")
    return folder, write_index(folder, MILLION)


def open_index(million, **data):
    folder, manifest = million
    raw = {
        "model": {"path": "unused"},
        "data": {"source": "pickapic", "path": "unused", **data},
        "prepare": {"cache_dir": str(folder)},
        "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
    }
    return PairCache(folder, manifest, parse_config(raw))


def resident():
    """Private memory of this process in bytes (pages of mapped files are not)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def test_a_million_pairs_are_opened_without_being_loaded(million):
    open_index(million)
    gc.collect()
    before = resident()
    cache = open_index(million)
    total = int(cache.bucket.sum()) + int(cache.pair_keys.max())
    assert total > 0
    assert len(cache) == len(cache.pair_ids) == MILLION
    assert resident() - before < 8 * MILLION, "eight bytes a pair"
    assert cache.pair_ids[654_321] == f"{654_321:09d}:{654_321:032x}"
    assert cache.pair_ids[-2:] == [f"{n:09d}:{n:032x}" for n in (999_998, 999_999)]
    assert fastest(lambda: open_index(million)) < 1.0
    assert len(pickle.dumps(cache)) < 2**20
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.bucket, cache.bucket)


def test_what_is_written_into_the_index_stays_private(million):
    cache = open_index(million)
    first = int(cache.pair_keys[0])
    cache.pair_keys[0] = -1
    assert int(open_index(million).pair_keys[0]) == first


def test_a_limit_cuts_the_index(million):
    cache = open_index(million, limit=1000)
    assert len(cache) == len(cache.bucket) == len(cache.pair_ids) == len(cache.flipped) == 1000
    assert torch.equal(cache.pair_keys, open_index(million).pair_keys[:1000])


def test_a_million_pairs_shuffle_like_one_sort(million):
    bucket = open_index(million).bucket
    sampler = PairSampler(bucket, 4, seed=1)
    values = np.random.default_rng(0).integers(0, 2**63, MILLION)
    epochs = itertools.count()
    per_epoch = sampler.micro_batches_per_epoch
    shuffle = fastest(lambda: sampler.micro_batch(next(epochs) * per_epoch))
    assert shuffle < 6 * fastest(lambda: np.argsort(values, kind="stable"))
    tracemalloc.start()
    fresh = PairSampler(bucket, 4, seed=1)
    fresh.micro_batch(0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 16 * MILLION
    assert peak < 48 * MILLION


def test_resuming_costs_the_same_everywhere(million):
    bucket = open_index(million).bucket
    sampler = PairSampler(bucket, 4, seed=1)
    run = sampler.micro_batches_per_epoch * 7
    order = [sampler.micro_batch(n) for n in range(run - 5, run + 5)]
    fresh = PairSampler(bucket, 4, seed=1)
    assert [fresh.micro_batch(n) for n in range(run - 5, run + 5)] == order
    first = fastest(lambda: PairSampler(bucket, 4, 1).micro_batch(0))
    late = fastest(lambda: PairSampler(bucket, 4, 1).micro_batch(run - 5))
    assert late < 4 * first


def test_64_ranks_share_an_epoch_of_a_million(million):
    sampler = PairSampler(open_index(million).bucket, 4, seed=1)
    steps = sampler.micro_batches_per_epoch // 64
    seen = np.zeros(MILLION, dtype=np.int64)
    for rank in range(64):
        numbers = micro_batch_numbers(
            rank=rank, world_size=64, accumulation_steps=1, start_step=0, total_steps=steps
        )
        assert len(numbers) == steps
        for n in numbers[:: steps // 40]:
            np.add.at(seen, sampler.micro_batch(n)[1], 1)
    assert seen.max() == 1
    rest = range(64 * steps, sampler.micro_batches_per_epoch)
    assert len(rest) < 64
    everything = [
        i for n in range(sampler.micro_batches_per_epoch) for i in sampler.micro_batch(n)[1]
    ]
    assert len(everything) == MILLION
    assert np.bincount(everything, minlength=MILLION).max() == 1
