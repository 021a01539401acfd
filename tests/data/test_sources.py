"""Every published schema, and every way in which a file can break it."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from fastpo.config import DataConfig
from fastpo.data.sources import open_source, source_digest
from fastpo.data.sources.bad_rows import most_bad
from fastpo.errors import DataError
from fastpo.testing import image_bytes, pickapic_row, write_folder, write_pickapic


def pickapic(path, **options):
    return open_source(DataConfig(source="pickapic", path=str(path), **options))


def hpdv2(path, **options):
    return open_source(DataConfig(source="hpdv2", path=str(path), **options))


def folder(path, **options):
    return open_source(DataConfig(source="folder", path=str(path), **options))


def ids(source):
    return [pair.pair_id for pair in source]


def refusal(source, path, **options):
    """What is told where no row may be bad."""
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(source=source, path=str(path), max_bad=0, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reasons(source):
    return [(row.place, row.reason) for row in source.bad.kept]


def without(row, *columns):
    return {k: v for k, v in row.items() if k not in columns}


def test_pickapic_yields_the_preferred_image_first(tmp_path):
    rows = [pickapic_row(0, 1.0), pickapic_row(1, 0.0)]
    write_pickapic(tmp_path / "train-00000-of-00001.parquet", rows)
    first, second = pickapic(tmp_path)
    assert (first.winner(), first.loser()) == (rows[0]["jpg_0"], rows[0]["jpg_1"])
    assert (second.winner(), second.loser()) == (rows[1]["jpg_1"], rows[1]["jpg_0"])
    assert first.prompt == "caption 0"
    assert first.pair_id == "1000:uid-0:uid-1"
    assert not first.flipped


def test_ties_and_unlabeled_rows_are_dropped_and_counted(tmp_path):
    labels = [1.0, 0.5, 0.0, 0.5, None, 1.0]
    rows = [pickapic_row(i, label, has_label=label is not None) for i, label in enumerate(labels)]
    write_pickapic(tmp_path / "train-0.parquet", rows)
    source = pickapic(tmp_path)
    assert source.report.as_dict() == {
        "rows": 6,
        "ties": 2,
        "unlabeled": 1,
        "pairs": 3,
        "duplicates": 0,
    }
    assert [pair.winner() for pair in source] == [
        rows[0]["jpg_0"],
        rows[2]["jpg_1"],
        rows[5]["jpg_0"],
    ]


def test_labels_are_indexed_without_reading_an_image(tmp_path):
    write_pickapic(tmp_path / "train-0.parquet", [pickapic_row(i) for i in range(10)])
    source = pickapic(tmp_path)
    pairs = list(source)
    assert source.images.reads == 0
    for pair in pairs:
        pair.winner(), pair.loser()
    assert source.images.reads == 3  # ten rows in groups of four, each read once


@pytest.mark.parametrize(
    ("labels", "shown"),
    [((0.7, 0.3), "label_0=0.7, label_1=0.3"), ((1.0, 1.0), "label_0=1"), ((None, 1.0), "null")],
)
def test_wrong_label_is_named_by_file_row_and_value(tmp_path, labels, shown):
    rows = [pickapic_row(i) for i in range(7)]
    rows[5] |= {"label_0": labels[0], "label_1": labels[1]}
    path = write_pickapic(tmp_path / "train-0.parquet", rows)
    source = pickapic(tmp_path)
    assert (source.report.rows, source.report.bad, source.report.pairs) == (7, 1, 6)
    assert [pair.pair_id for pair in source] == [
        f"{1000 + i}:uid-{2 * i}:uid-{2 * i + 1}" for i in (0, 1, 2, 3, 4, 6)
    ]
    ((place, reason),) = reasons(source)
    assert place == f"{path}: row 5" and shown in reason
    assert re.search(
        rf"1 of 7 rows are bad.*{path}: row 5: .*{shown}", refusal("pickapic", tmp_path)
    )


def test_a_null_caption_is_left_out_wherever_it_stands(tmp_path):
    rows = [pickapic_row(i, 0.5 if i == 6 else 1.0) for i in range(9)]
    for number in (1, 4, 6):
        rows[number]["caption"] = None
    path = write_pickapic(tmp_path / "train-0.parquet", rows)
    source = pickapic(tmp_path)
    assert reasons(source) == [(f"{path}: row {row}", "caption is null") for row in (1, 4)]
    assert (source.report.ties, source.report.bad, len(source)) == (1, 2, 6)
    assert [pair.prompt for pair in source] == [f"caption {i % 3}" for i in (0, 2, 3, 5, 7, 8)]
    assert source.prompt_table().prompts == ["", "caption 0", "caption 2", "caption 1"]


def test_a_row_without_labels_is_unlabeled_where_no_column_says_so(tmp_path):
    rows = [without(pickapic_row(i, None if i == 1 else 1.0), "has_label") for i in range(3)]
    write_pickapic(tmp_path / "train-0.parquet", rows)
    assert pickapic(tmp_path).report.as_dict() == {
        "rows": 3,
        "ties": 0,
        "unlabeled": 1,
        "pairs": 2,
        "duplicates": 0,
    }


def test_missing_column_names_what_was_expected_and_found(tmp_path):
    rows = [without(pickapic_row(0), "jpg_1", "label_0")]
    path = write_pickapic(tmp_path / "train-0.parquet", rows)
    with pytest.raises(DataError, match=r"missing column jpg_1, label_0; expected .*found caption"):
        pickapic(tmp_path)
    write_pickapic(path, [pickapic_row(0, jpg_0="http://x")])
    with pytest.raises(DataError, match="column jpg_0 is string"):
        pickapic(tmp_path)
    write_pickapic(path, [pickapic_row(0) | {"label_0": [1], "label_1": [0]}])
    with pytest.raises(DataError, match=r"column label_0 is list<.*>; expected a number in"):
        pickapic(tmp_path)


def test_nothing_but_ties_is_an_error(tmp_path):
    write_pickapic(tmp_path / "train-0.parquet", [pickapic_row(i, 0.5) for i in range(3)])
    with pytest.raises(DataError, match="no labeled pair: 3 rows, 3 ties"):
        pickapic(tmp_path)
    path = tmp_path / "train-0.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match="no labeled pair: 0 rows"):
        pickapic(tmp_path)


def test_split_is_matched_whole_and_the_data_folder_is_searched(tmp_path):
    write_pickapic(tmp_path / "data" / "validation-00000-of-00001-ab.parquet", [pickapic_row(0)])
    write_pickapic(tmp_path / "data" / "validation_unique-0.parquet", [pickapic_row(1)])
    assert ids(pickapic(tmp_path, split="validation")) == ["1000:uid-0:uid-1"]
    with pytest.raises(DataError, match=r"no train-\*\.parquet .*validation_unique-0"):
        pickapic(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        pickapic(tmp_path / "nowhere")


def test_unreadable_parquet_is_named(tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"train-0\.parquet is not a readable parquet file"):
        pickapic(tmp_path)


@pytest.mark.parametrize("source", ["pickstyle", "picksafety"])
def test_integer_labels_without_uids_are_named_by_content(tmp_path, source):
    drop = ("has_label", "ranking_id", "image_0_uid", "image_1_uid")
    rows = [without(pickapic_row(i), *drop) | {"label_0": 1, "label_1": 0} for i in range(4)]
    config = DataConfig(source=source, path=str(tmp_path))
    write_pickapic(tmp_path / "train-0.parquet", rows)
    names = ids(open_source(config))
    write_pickapic(tmp_path / "train-0.parquet", rows[::-1])
    assert ids(open_source(config)) == names[::-1]
    assert len(set(names)) == 4
    turned = [row | {"label_0": 0, "label_1": 1} for row in rows]
    write_pickapic(tmp_path / "train-0.parquet", turned)
    assert ids(open_source(config)) == names, "the name must not depend on the label"


def test_names_do_not_depend_on_rows_and_files(tmp_path):
    rows = [pickapic_row(i) for i in range(6)]
    write_pickapic(tmp_path / "a" / "train-0.parquet", rows)
    write_pickapic(tmp_path / "b" / "train-0.parquet", rows[4:], group_size=1)
    write_pickapic(tmp_path / "b" / "train-1.parquet", [pickapic_row(9, 0.5), *rows[:4]])
    assert sorted(ids(pickapic(tmp_path / "a"))) == sorted(ids(pickapic(tmp_path / "b")))


def test_duplicates_get_a_numbered_suffix_and_are_reported(tmp_path):
    rows = [pickapic_row(0), pickapic_row(1), pickapic_row(0), pickapic_row(0)]
    write_pickapic(tmp_path / "train-0.parquet", rows)
    source = pickapic(tmp_path)
    for _ in range(2):
        assert [name.removeprefix("1000:uid-0:uid-1") for name in ids(source)] == [
            "",
            "1001:uid-2:uid-3",
            "#2",
            "#3",
        ]
        assert source.report.duplicates == 2


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 100])
def test_limit_counts_pairs_and_stops_the_scan(tmp_path, limit):
    labels = [1.0, 0.5, 0.0, 1.0, 0.5, 0.0, 1.0]
    rows = [pickapic_row(i, label) for i, label in enumerate(labels)]
    write_pickapic(tmp_path / "train-0.parquet", rows[:3], group_size=2)
    write_pickapic(tmp_path / "train-1.parquet", rows[3:], group_size=2)
    source = pickapic(tmp_path, limit=limit)
    everything = ids(pickapic(tmp_path))
    assert ids(source) == everything[:limit]
    report = source.report
    assert len(source) == report.pairs == min(limit, 5)
    assert report.rows == report.pairs + report.ties == {1: 1, 3: 4, 4: 6}.get(limit, 7)


def test_images_cast_to_a_struct_are_read(tmp_path):
    row = pickapic_row(0)
    cast = {name: {"bytes": row[name], "path": None} for name in ("jpg_0", "jpg_1")}
    write_pickapic(tmp_path / "train-0.parquet", [row | cast])
    (pair,) = pickapic(tmp_path)
    assert (pair.winner(), pair.loser()) == (row["jpg_0"], row["jpg_1"])


def test_hub_files_are_fetched_one_by_one_up_to_the_limit(tmp_path, monkeypatch):
    import huggingface_hub

    names = [f"data/train-{i}.parquet" for i in range(3)]
    for i, name in enumerate(names):
        write_pickapic(tmp_path / name, [pickapic_row(2 * i), pickapic_row(2 * i + 1)])
    fetched = []

    def download(repo, name, **kwargs):
        fetched.append(name)
        return str(tmp_path / name)

    def snapshot(repo, *, allow_patterns, **kwargs):
        fetched.extend(n for n in listing if any(fnmatch(n, p) for p in allow_patterns))
        return str(tmp_path)

    listing = [*names, "data/test-0.parquet", "data/train_unique-0.parquet", "README.md"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: listing)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert len(ids(pickapic("owner/data", limit=3))) == 3
    assert fetched == names[:2]
    fetched.clear()
    assert len(ids(pickapic("owner/data"))) == 6
    assert fetched == names
    assert source_digest(DataConfig(source="pickapic", path="owner/data")) is None


def test_unreachable_hub_data_is_fetched_from_before_or_a_clear_error(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise RuntimeError("no connection")

    def snapshot(*args, local_files_only, **kwargs):
        assert local_files_only, "a limit must not fetch everything"
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    write_pickapic(tmp_path / "data" / "train-0.parquet", [pickapic_row(0)])
    assert len(pickapic("owner/data", limit=1)) == 1
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for limit in (None, 1):
        with pytest.raises(DataError, match="could not be fetched from the hub: no connection"):
            pickapic("owner/data", limit=limit)


@pytest.fixture
def hpd(tmp_path):
    """HPDv2 with images in their split's folders."""
    for split, names in {"train": "abcd", "test": "pqrs"}.items():
        (tmp_path / split).mkdir()
        for i, name in enumerate(names):
            (tmp_path / split / f"{name}.jpg").write_bytes(image_bytes(i, encoding="JPEG"))
    train = [
        {"prompt": "x", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]},
        {"prompt": "y", "file_path": ["c.jpg", "d.jpg"], "human_preference": [1, 0]},
        {"prompt": "z", "file_path": ["a.jpg", "d.jpg"], "human_preference": [1, 1]},
    ]
    test = [
        {"prompt": "x", "image_path": ["p.jpg", "q.jpg", "r.jpg", "s.jpg"], "rank": [2, 1, 3, 2]}
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps(test))
    return tmp_path


def test_hpdv2_train(hpd):
    source = hpdv2(hpd)
    first, second = source
    assert first.winner() == (hpd / "train" / "b.jpg").read_bytes()
    assert first.loser() == (hpd / "train" / "a.jpg").read_bytes()
    assert second.winner() == (hpd / "train" / "c.jpg").read_bytes()
    assert (source.report.rows, source.report.ties, source.report.pairs) == (3, 1, 2)


def test_hpdv2_test_gives_all_ordered_pairs_lower_rank_first(hpd):
    source = hpdv2(hpd, split="test")
    read = {(hpd / "test" / f"{n}.jpg").read_bytes(): n for n in "pqrs"}
    assert {(read[p.winner()], read[p.loser()]) for p in source} == {
        ("q", "p"),
        ("q", "r"),
        ("q", "s"),
        ("p", "r"),
        ("s", "r"),
    }
    assert (source.report.rows, source.report.ties, source.report.pairs) == (6, 1, 5)
    assert len(set(ids(source))) == 5
    assert ids(hpdv2(hpd, split="test", limit=2)) == ids(source)[:2]


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"prompt": "x", "image_path": ["a.jpg", "b.jpg"]}, "entry 0: missing key file_path"),
        ({"prompt": "x", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1]}, "for 2 images"),
        (
            {"prompt": "x", "file_path": ["a.jpg", "b.jpg"], "human_preference": [2, 0]},
            r"human_preference is \[2, 0\]",
        ),
        ({"prompt": 3, "file_path": [], "human_preference": []}, "prompt is 3"),
        ("text", "got str"),
        (
            {"prompt": "x", "file_path": ["u.jpg", "v.jpg"], "human_preference": [1, 0]},
            r"image u\.jpg is neither in",
        ),
    ],
)
def test_hpdv2_complaints_name_file_and_entry(hpd, entry, complaint):
    (hpd / "train.json").write_text(json.dumps([entry]))
    words = refusal("hpdv2", hpd)
    assert re.search(complaint, words)
    if "neither" in complaint:
        return
    good = {"prompt": "x", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}
    (hpd / "train.json").write_text(json.dumps([entry, good]))
    source = hpdv2(hpd)
    assert (source.report.rows, source.report.bad, len(source)) == (2, 1, 1)
    assert next(iter(source)).winner() == (hpd / "train" / "a.jpg").read_bytes()
    assert re.search(complaint, f"{reasons(source)[0][0]}: {reasons(source)[0][1]}")


def test_hpdv2_s_images_are_looked_for_past_a_missing_one(hpd):
    (hpd / "train" / "b.jpg").unlink()
    assert next(iter(hpdv2(hpd))).loser() == (hpd / "train" / "a.jpg").read_bytes()
    (hpd / "train" / "a.jpg").unlink()
    assert len(hpdv2(hpd)) == 2, "c and d are there"


def test_hpdv2_missing_listing_or_split(hpd):
    (hpd / "test.json").unlink()
    with pytest.raises(DataError, match=r"missing file: .*test\.json.*found: .*train\.json"):
        hpdv2(hpd, split="test")
    with pytest.raises(DataError, match="train and test, got 'validation'"):
        hpdv2(hpd, split="validation")
    (hpd / "train.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        hpdv2(hpd)


def test_plain_folder(tmp_path):
    source = folder(write_folder(tmp_path, 4))
    assert ids(source) == ["p0", "p1", "p2", "p3"]
    assert next(iter(source)).winner() == (tmp_path / "winner0.png").read_bytes()
    assert next(iter(source)).loser() == (tmp_path / "loser0.png").read_bytes()
    assert ids(folder(tmp_path, limit=2)) == ["p0", "p1"]


def test_plain_folder_names_without_id_survive_relabeling_and_reordering(tmp_path):
    write_folder(tmp_path, 3)
    path = tmp_path / "pairs.jsonl"
    entries = [without(json.loads(line), "id") for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, entries)))
    names = ids(folder(tmp_path))
    turned = [e | {"winner": e["loser"], "loser": e["winner"]} for e in entries[::-1]]
    path.write_text("\n\n".join(map(json.dumps, turned)) + "\n")
    assert ids(folder(tmp_path)) == names[::-1]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"prompt": "x", "winner": "winner0.png"}', "line 2: missing key loser"),
        ('{"prompt": 1, "winner": "a", "loser": "b"}', "line 2: prompt is 1"),
        (
            '{"prompt": "", "winner": "no", "loser": "b"}',
            "line 2: winner and loser image not found",
        ),
        ("[]", "line 2: expected .* got list"),
    ],
)
def test_plain_folder_complaints_name_the_line(tmp_path, line, complaint):
    path = write_folder(tmp_path, 2) / "pairs.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text("\n".join([first, line, second]))
    assert re.search(complaint, refusal("folder", tmp_path))
    source = folder(tmp_path)
    missing = "not found" in complaint
    assert [name for name in ids(source) if ":" not in name] == ["p0", "p1"]
    assert len(source) == 2 + missing
    assert [pair.prompt for pair in source.pairs(1)][-1] == "prompt 1"
    assert source.report.rows == 3 and source.report.bad == (not missing)
    assert len(source.prompt_table().numbers) == len(source)


def test_all_bad_lines_are_told_at_once(tmp_path):
    data = write_folder(tmp_path, 30)
    for number in (3, 8):
        (data / f"winner{number}.png").unlink()
    lines = (data / "pairs.jsonl").read_text().splitlines()
    lines[5] = json.dumps(json.loads(lines[5]) | {"prompt": None})
    lines[11] = "no JSON"
    (data / "pairs.jsonl").write_text("\n".join(lines))
    words = refusal("folder", tmp_path)
    assert "4 of 30 rows are bad, at most 0 may be (data.max_bad 0)" in words
    for line, reason in [
        (4, "winner image not found"),
        (6, "prompt is None"),
        (9, "winner image not found"),
        (12, "not valid JSON"),
    ]:
        assert f"line {line}: {reason}" in words


@pytest.mark.parametrize(
    ("share", "rows", "most"),
    [
        (None, 2, 1),
        (None, 20, 10),
        (None, 1000, 16),
        (None, 10_000, 100),
        (0.01, 100, 1),
        (0.01, 99, 0),
        (0.29, 100, 29),
        (0.0, 10**6, 0),
        (1.0, 7, 7),
    ],
)
def test_how_many_rows_may_be_bad(share, rows, most):
    assert most_bad(share, rows) == most


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("2.5 %", 0.025), (0.5, 0.5), (0, 0.0)])
def test_the_share_of_bad_rows_may_be_in_percent(text, share):
    assert DataConfig(source="folder", path="x", max_bad=text).max_bad == share
    for wrong in ("x%", "101%", True, -0.1, "nan%"):
        with pytest.raises(ValidationError):
            DataConfig(source="folder", path="x", max_bad=wrong)


def test_plain_folder_without_listing(tmp_path):
    with pytest.raises(DataError, match=r"missing file: .*pairs\.jsonl.*empty folder"):
        folder(tmp_path)


def test_digest_follows_the_files(tmp_path):
    config = DataConfig(source="folder", path=str(write_folder(tmp_path, 2)))
    before = source_digest(config)
    assert before == source_digest(config)
    write_folder(tmp_path, 3)
    assert source_digest(config) != before
    assert source_digest(DataConfig(source="folder", path=str(Path("nowhere")))) is None


def test_row_group_reads_only_the_image_columns(tmp_path, monkeypatch):
    """The label pass must never ask for image columns: Pick-a-Pic v2 has 335 GB of them."""
    write_pickapic(tmp_path / "train-0.parquet", [pickapic_row(i) for i in range(4)])
    asked = []
    original = pq.ParquetFile.read_row_group

    def spy(self, *args, columns=None, **kwargs):
        asked.append(columns)
        return original(self, *args, columns=columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    list(pickapic(tmp_path))
    assert asked
    assert not any(c is None or {"jpg_0", "jpg_1"} & set(c) for c in asked)
