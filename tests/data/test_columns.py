"""Parquet columns in every type that people store them in: read, or refused by name and type."""

import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpo.config import DataConfig
from fastpo.data.sources import open_source, parquet
from fastpo.errors import DataError
from fastpo.testing import pickapic_row, write_pickapic

ROWS = 9
LABELS = [1.0, 0.0, 0.5] * 3
WHOLE = [1.0, 0.0, 1.0] * 3


def write(folder, labels=LABELS, **columns):
    """Nine rows in groups of four; `columns` replaces columns of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([pickapic_row(i, label) for i, label in enumerate(labels)])
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, values)
    pq.write_table(table, folder / "train-0.parquet", row_group_size=4)
    return table


def opened(folder, **options):
    return open_source(DataConfig(source="pickapic", path=str(folder), **options))


def told(folder):
    """Everything that a source gives: names, prompts, images."""
    return [(p.pair_id, p.prompt, p.winner(), p.loser()) for p in opened(folder)]


def captions():
    return [f"caption {i % 3}" for i in range(ROWS)]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_captions_of_every_type_of_text(tmp_path, kind):
    write(tmp_path / "plain")
    write(tmp_path / "other", caption=pa.array(captions()).cast(kind))
    assert told(tmp_path / "other") == told(tmp_path / "plain")
    assert opened(tmp_path / "other").prompt_table().prompts == ["", *captions()[:2]]
    some = pa.array([None, *captions()[1:]]).cast(kind)
    write(tmp_path / "null", caption=some)
    source = opened(tmp_path / "null")
    assert source.report.bad == 1 and next(iter(source)).prompt == "caption 1"


def label_columns(kind, values):
    """`label_0` and `label_1` in another type."""
    both = (values, [1 - value for value in values])
    if kind == "text":
        return [pa.array([f"{v:g}" if v != 0.5 else " 0.50" for v in side]) for side in both]
    if kind == "dictionary":
        return [pa.array([f"{v:g}" for v in side]).dictionary_encode() for side in both]
    if kind == "decimal":
        return [pa.array([decimal.Decimal(str(v)) for v in side]) for side in both]
    if kind == "half":
        return [pa.array(np.array(side, dtype=np.float16)) for side in both]
    return [pa.array(side).cast(kind) for side in both]


@pytest.mark.parametrize(
    "kind", ["text", "dictionary", "decimal", "half", pa.int8(), pa.uint64(), pa.bool_()], ids=str
)
def test_labels_of_every_type_of_number(tmp_path, kind):
    values = WHOLE if isinstance(kind, pa.DataType) else LABELS
    write(tmp_path / "plain", values)
    first, second = label_columns(kind, values)
    write(tmp_path / "other", values, label_0=first, label_1=second)
    assert told(tmp_path / "other") == told(tmp_path / "plain")
    assert opened(tmp_path / "other").report == opened(tmp_path / "plain").report


def test_a_label_that_is_no_number_is_a_bad_row(tmp_path):
    first, second = label_columns("text", WHOLE)
    write(tmp_path, WHOLE, label_0=pa.array(["left", *first.to_pylist()[1:]]), label_1=second)
    source = opened(tmp_path)
    assert len(source) == ROWS - 1
    (row,) = source.bad.kept
    assert row.reason.startswith("label_0='left', label_1='0': labels must be 0, 0.5 or 1")


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64()], ids=str)
def test_has_label_may_be_a_whole_number(tmp_path, kind):
    write(tmp_path, has_label=pa.array([1, 1, 1, 0, 1, 1, 1, None, 1]).cast(kind))
    assert opened(tmp_path).report.unlabeled == 1


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("caption", pa.array([["a", "b"]] * ROWS), "column caption is list<.*>; expected text"),
        ("caption", pa.array(range(ROWS)), "column caption is int64; expected text"),
        ("label_1", pa.array([[1, 2]] * ROWS), "column label_1 is list<.*>; expected a number"),
        ("label_0", pa.array([b"1"] * ROWS), "column label_0 is binary; expected a number"),
        ("jpg_0", pa.array([[1, 2]] * ROWS), "column jpg_0 is list<.*>; expected the image's"),
        ("jpg_1", pa.array([{"url": "x"}] * ROWS), "column jpg_1 is struct<url: string>; expected"),
        ("has_label", pa.array(["yes"] * ROWS), "column has_label is string; expected true"),
    ],
)
def test_other_types_are_refused_by_column_and_type(tmp_path, name, column, words):
    write(tmp_path, **{name: column})
    with pytest.raises(DataError, match=words) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view()], ids=str)
def test_images_of_every_type_of_bytes(tmp_path, kind):
    table = write(tmp_path / "plain")
    images = {name: table[name].cast(kind) for name in ("jpg_0", "jpg_1")}
    write(tmp_path / "other", **images)
    assert told(tmp_path / "other") == told(tmp_path / "plain")


def test_images_that_are_named_are_read_beside_the_file(tmp_path):
    """The `datasets` Image feature without embedded bytes."""
    table = write(tmp_path / "plain")
    columns = {}
    for name in ("jpg_0", "jpg_1"):
        cells = []
        for number, data in enumerate(table[name].to_pylist()):
            path = f"{name}-{number}.jpg"
            (tmp_path / path).write_bytes(data)
            embedded = {"bytes": data, "path": "/elsewhere/unused.jpg"}
            cells.append(embedded if number % 2 else {"bytes": None, "path": path})
        columns[name] = pa.array(cells)
    write(tmp_path, **columns)
    assert told(tmp_path) == told(tmp_path / "plain")
    (tmp_path / "jpg_0-0.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        next(iter(opened(tmp_path))).winner()
    columns["jpg_0"] = pa.array([{"bytes": None, "path": "/elsewhere/a.jpg"}] * ROWS)
    write(tmp_path, **columns)
    with pytest.raises(DataError, match=r"leads out of .*allow_outside"):
        next(iter(opened(tmp_path))).winner()


def test_structs_of_images_are_read_some_rows_at_a_time(tmp_path, monkeypatch):
    """As one array, a row group with more than 2 GiB of them is more than Arrow converts."""
    row = [pickapic_row(i) for i in range(8)]
    cast = [
        r | {name: {"bytes": r[name], "path": None} for name in ("jpg_0", "jpg_1")} for r in row
    ]
    write_pickapic(tmp_path / "train-0.parquet", cast, group_size=8)
    whole, batches = pq.ParquetFile.read_row_group, pq.ParquetFile.iter_batches
    sizes = []

    def as_arrow_does(self, *args, columns, **options):
        if any("struct" in str(self.schema_arrow.field(name).type) for name in columns):
            raise pa.ArrowNotImplementedError(
                "Nested data conversions not implemented for chunked array outputs"
            )
        return whole(self, *args, columns=columns, **options)

    def spy(self, **options):
        for batch in batches(self, **options):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", as_arrow_does)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    about = pq.ParquetFile(tmp_path / "train-0.parquet").metadata.row_group(0)
    size = max(about.column(k).total_uncompressed_size for k in range(about.num_columns))
    monkeypatch.setattr(parquet, "MOST_BATCH_BYTES", size // 3)
    source = opened(tmp_path)
    assert [(p.winner(), p.loser()) for p in source] == [(r["jpg_0"], r["jpg_1"]) for r in row]
    assert sizes == [2, 2, 2, 2] and source.images.reads == 1
