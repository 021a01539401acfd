"""`pair_weight`: a number beside a pair, from every source into the cache and out of it."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpo.config import DataConfig
from fastpo.data.cache.arrow import open_arrow
from fastpo.data.cache.index import INDEX_TYPES
from fastpo.data.cache.parts import INDEX_SCHEMA
from fastpo.data.prepare import prepare
from fastpo.data.sources import open_source
from fastpo.errors import CacheError, TooManyBadRowsError
from fastpo.testing import pickapic_row, write_folder, write_pickapic

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = [None, 0, 2.5, "0.25"]
"""As listings may hold them; text of a number is one."""
MEANT = [None, 0.0, 2.5, 0.25]


def entries(folder, weights=WEIGHTS):
    """Lines of a listing, of which those without a weight lack the key."""
    lines = (write_folder(folder, len(weights)) / "pairs.jsonl").read_text().splitlines()
    rows = zip(map(json.loads, lines), weights, strict=True)
    return [row if w is None else row | {"pair_weight": w} for row, w in rows]


def write_json_lines(folder, name, rows):
    (folder / "pairs.jsonl").unlink()
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(folder, name, rows):
    (folder / "pairs.jsonl").unlink()
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[1]])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(folder, name, rows):
    (folder / "pairs.jsonl").unlink()
    rows = [row | {"pair_weight": meant} for row, meant in zip(rows, MEANT, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


def weights_of(path, source="folder", **options):
    config = DataConfig.model_validate({"source": source, "path": str(path), **options})
    return [p.weight for p in open_source(config)]


def listed(weights):
    assert weights is not None
    return weights.tolist()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("pairs.jsonl", write_json_lines),
        ("metadata.jsonl", write_json_lines),
        ("pairs.csv", write_csv),
        ("pairs.parquet", write_parquet),
    ],
)
def test_every_listing_may_hold_weights(tmp_path, name, write):
    write(tmp_path, name, entries(tmp_path))
    assert weights_of(tmp_path) == MEANT


def test_pick_a_pics_columns_may_hold_weights(tmp_path):
    rows = [pickapic_row(k, pair_weight=weight) for k, weight in enumerate(MEANT)]
    write_pickapic(tmp_path / "train-0.parquet", [*rows, pickapic_row(9, 0.5, pair_weight=-1.0)])
    assert weights_of(tmp_path, "pickapic") == MEANT  # the last one is a tie


@pytest.mark.parametrize("wrong", [-0.5, 1e7, "much", True, [1.0]])
@pytest.mark.parametrize("name", ["pairs.jsonl", "metadata.jsonl"])
def test_a_wrong_weight_is_a_bad_row(tmp_path, name, wrong):
    write_json_lines(tmp_path, name, entries(tmp_path, [1.0, wrong, None]))
    assert weights_of(tmp_path) == [1.0, None]
    with pytest.raises(TooManyBadRowsError, match=r"pair_weight is .*expected a number from 0 to"):
        weights_of(tmp_path, max_bad=0.0)


def test_a_wrong_weight_is_a_bad_row_of_pick_a_pic_too(tmp_path):
    rows = [pickapic_row(k, pair_weight=weight) for k, weight in enumerate([1.0, -1.0, 2.0])]
    write_pickapic(tmp_path / "train-0.parquet", rows)
    assert weights_of(tmp_path, "pickapic") == [1.0, 2.0]


def prepared(config_for, tmp_path, weights, **sections):
    data = tmp_path / "data"
    write_json_lines(data, "pairs.jsonl", entries(data, weights))
    return prepare(config_for(prepare={"shard_size": 2, **sections}), progress=False)


def test_the_cache_holds_weights_and_batches_bring_them(config_for, tmp_path):
    """The first shard of two pairs has none of its own; without one a pair's weight is 1."""
    cache = prepared(config_for, tmp_path, [None, None, 0.5, 3])
    assert listed(cache.pair_weight) == [1.0, 1.0, 0.5, 3.0]
    batch = cache.read([3, 0, 2], visit=0)
    assert listed(batch.pair_weight) == [3.0, 1.0, 0.5]
    assert listed(batch.map(lambda tensor: tensor.flip(0)).pair_weight) == [0.5, 1.0, 3.0]


def test_a_cache_without_weights_is_what_it_was(config_for, tmp_path):
    cache = prepared(config_for, tmp_path, [None, None])
    assert cache.pair_weight is None and cache.read([0], visit=0).pair_weight is None
    assert open_arrow(cache.folder / "index.arrow").schema.names == list(INDEX_TYPES)
    assert pq.read_schema(cache.folder / "shard-00000" / "index.parquet").equals(INDEX_SCHEMA)


def test_another_weight_is_another_cache_whose_images_are_reused(config_for, tmp_path):
    cache = prepared(config_for, tmp_path, [1.0, 2.0])
    with pytest.raises(CacheError, match="data files"):
        prepared(config_for, tmp_path, [1.0, 4.0])
    folders = {"cache_dir": str(tmp_path / "other"), "reuse": str(cache.folder)}
    other = prepared(config_for, tmp_path, [1.0, 4.0], **folders)
    assert listed(other.pair_weight) == [1.0, 4.0]
    assert other.encoded(1).equal(cache.encoded(1))


def test_a_changed_weight_in_a_parquet_file_of_the_same_size_is_noticed(config_for, tmp_path):
    def write(weight):
        rows = [pickapic_row(k, pair_weight=w) for k, w in enumerate([1.0, weight, 3.0])]
        return write_pickapic(tmp_path / "data" / "train-0.parquet", rows).stat().st_size

    config = config_for(data={"source": "pickapic", "path": str(tmp_path / "data")})
    size = write(0.7)
    prepare(config, progress=False)
    assert write(0.9) == size
    with pytest.raises(CacheError, match="1001:uid-2:uid-3"):
        prepare(config, progress=False)
