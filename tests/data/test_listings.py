"""Listings as people keep them: CSV, Parquet, `imagefolder` metadata, with or without a BOM."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpo.config import DataConfig, load_config
from fastpo.data.prepare import prepare
from fastpo.data.sources import open_source, source_digest, source_stamp
from fastpo.errors import DataError
from fastpo.evaluate.sampling import plan_samples
from fastpo.testing import write_folder

BOM = b"\xef\xbb\xbf"


def opened(path, **options):
    return open_source(DataConfig(source="folder", path=str(path), **options))


def told(source):
    return [(p.pair_id, p.prompt, p.winner(), p.loser()) for p in source]


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / "data", 4)


@pytest.fixture
def entries(data):
    return [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture
def plain(data, entries):
    """What `pairs.jsonl` gives, which then goes."""
    pairs = told(opened(data))
    (data / "pairs.jsonl").unlink()
    return pairs


def renamed(entries, **names):
    return [{names.get(key, key): value for key, value in entry.items()} for entry in entries]


def write_csv(path, rows, end="\n"):
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", ["pairs.csv", "metadata.csv", "train/metadata.csv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_csv(data, entries, plain, name, end, bom):
    write_csv(data / name, entries, end)
    path = data / name
    path.write_bytes(bom + path.read_bytes())
    for file in data.glob("*.png") if "/" in name else ():
        file.rename(path.parent / file.name)
    source = opened(data)
    assert told(source) == plain
    assert source.prompt_table().prompts == ["", "prompt 0", "prompt 1", "prompt 2"]
    assert told(source.pairs(1, 3)) == plain[1:3]
    assert told(opened(path)) == plain, "the listing itself may be named"


@pytest.mark.parametrize(
    "names",
    [
        {"prompt": "caption", "winner": "chosen", "loser": "rejected"},
        {"prompt": "text", "winner": "chosen_file_name", "loser": "rejected_file_name"},
        {"winner": "preferred_file_name", "loser": "rejected_file_name"},
    ],
)
@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.parquet", "pairs.parquet"])
def test_other_names_of_columns(data, entries, plain, names, kind):
    rows = renamed(entries, **names)
    if kind.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), data / kind)
    else:
        text = "\r\n".join(map(json.dumps, rows))
        (data / kind).write_bytes(BOM + text.encode())
    assert told(opened(data)) == plain


def test_a_first_line_without_its_keys_is_one_bad_row(data, entries, plain):
    text = "\n".join(["{}", "7", *map(json.dumps, entries)])
    (data / "metadata.jsonl").write_text(text)
    source = opened(data)
    assert told(source) == plain and source.report.bad == 2
    assert "missing column prompt, winner, loser" in source.bad.kept[0].reason


def test_two_images_with_labels(data, plain, tmp_path):
    rows = []
    for number, label in enumerate(["1", "0", "0.5", "1.0", "", "7"]):
        file = min(number, 3)
        rows.append(
            {
                "caption": f"prompt {file % 3}",
                "image_0": f"{('winner', 'loser')[label == '0']}{file}.png",
                "image_1": f"{('loser', 'winner')[label == '0']}{file}.png",
                "label_0": label,
                "label_1": "" if not label else f"{1 - float(label):g}",
                "id": f"p{number}",
            }
        )
    write_csv(data / "pairs.csv", rows)
    source = opened(data)
    assert told(source) == [plain[0], plain[1], plain[3]]
    report = source.report
    assert (report.rows, report.ties, report.unlabeled, report.bad) == (6, 1, 1, 1)
    assert source.bad.kept[0].place == "line 7" and "sum to 1" in source.bad.kept[0].reason


def test_bad_rows_of_a_listing_are_left_out_with_their_lines(data, entries, plain):
    rows = [*entries, {**entries[0], "prompt": ""}, {**entries[0], "winner": ""}]
    rows += [{**entries[1], "id": "gone", "winner": "gone.png"}]
    write_csv(data / "pairs.csv", rows)
    source = opened(data)
    assert [pair.pair_id for pair in source] == ["p0", "p1", "p2", "p3", "gone"]
    assert [(row.place, row.reason.split(";")[0]) for row in source.bad.kept] == [
        ("line 6", "prompt is None"),
        ("line 7", "winner is None"),
        ("line 8", f"image not found: {data / 'gone.png'}"),
    ]
    with pytest.raises(DataError, match="3 of 7 rows are bad"):
        opened(data, max_bad="10%")


def test_what_no_listing_can_be_is_refused_by_column_and_type(data, entries, plain):
    table = pa.Table.from_pylist(entries)
    for name, column, words in [
        ("winner", pa.array([["a", "b"]] * 4), r"column winner is list<.*>; expected an image's"),
        ("loser", pa.array([b"x"] * 4), "column loser is binary; expected an image's path"),
        ("prompt", pa.array(range(4)), "column prompt is int64; expected text"),
    ]:
        place = table.column_names.index(name)
        pq.write_table(table.set_column(place, name, column), data / "pairs.parquet")
        with pytest.raises(DataError, match=words):
            opened(data)
    (data / "pairs.parquet").unlink()
    write_csv(data / "metadata.csv", [{"file_name": "winner0.png", "text": "prompt 0"}])
    with pytest.raises(DataError, match=r"metadata\.csv: missing column winner, loser; .*found"):
        opened(data)
    (data / "metadata.csv").write_bytes("prompt,winner,loser\nä,b,c\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"metadata\.csv cannot be read as CSV in UTF-8"):
        opened(data)
    (data / "metadata.csv").unlink()
    with pytest.raises(DataError, match=r"missing file: .*pairs\.jsonl.*pairs\.csv"):
        opened(data)


def test_a_listing_names_files_in_its_folder(data, entries, plain):
    write_csv(data / "pairs.csv", [{**entries[0], "winner": "../elsewhere.png"}, *entries[1:]])
    with pytest.raises(DataError, match=r"line 2: image .*leads out of .*allow_outside"):
        opened(data)


def test_digest_and_stamp_follow_listing_and_images(data, entries, plain):
    config = DataConfig(source="folder", path=str(data))
    write_csv(data / "pairs.csv", entries)
    digest, stamp = source_digest(config), source_stamp(config)
    (data / "loser2.png").write_bytes(b"other")
    assert source_digest(config) == digest and source_stamp(config) != stamp
    write_csv(data / "pairs.csv", entries[:3])
    assert source_digest(config) != digest


def test_a_cache_is_made_of_a_csv(config_for, data, entries):
    first = prepare(config_for(), progress=False)
    (data / "pairs.jsonl").unlink()
    write_csv(data / "pairs.csv", entries)
    config = config_for(prepare={"cache_dir": str(first.folder.with_name("other"))})
    cache = prepare(config, progress=False)
    assert cache.pair_ids == first.pair_ids
    assert (cache.read([2], 0).latent_mean == first.read([2], 0).latent_mean).all()


def test_a_byte_order_mark_in_front_is_passed_over(data, entries, config_for, tmp_path):
    expected = told(opened(data))
    listing = data / "pairs.jsonl"
    listing.write_bytes(BOM + listing.read_bytes().replace(b"\n", b"\r\n"))
    assert told(opened(data)) == expected
    hpdv2 = [
        {"prompt": e["prompt"], "file_path": [e["winner"], e["loser"]], "human_preference": [1, 0]}
        for e in entries
    ]
    (data / "train.json").write_bytes(BOM + json.dumps(hpdv2).encode())
    assert len(open_source(DataConfig(source="hpdv2", path=str(data)))) == 4
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(BOM + b"a castle\r\na boat\r\n")
    config = config_for(evaluate={"prompts_file": str(prompts), "seeds_per_prompt": 1})
    assert [sample.prompt for sample in plan_samples(config)] == ["a castle", "a boat"]
    path = tmp_path / "config.yaml"
    text = json.dumps(config.model_dump(mode="json")).encode()
    path.write_bytes(BOM + text)
    assert load_config(path) == config
