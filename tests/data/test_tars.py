"""WebDataset shards: pairs by key, images read from their place in the tar file."""

import io
import json
import tarfile

import pytest

from fastpo.config import DataConfig
from fastpo.data.prepare import prepare
from fastpo.data.sources import open_source, source_digest, source_stamp
from fastpo.errors import DataError
from fastpo.testing import image_bytes


def opened(path, **options):
    return open_source(DataConfig(source="folder", path=str(path), **options))


def write_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pair(number, prompt="a boat"):
    return [
        (f"in/{number}.winner.png", image_bytes(2 * number)),
        (f"in/{number}.loser.jpg", image_bytes(2 * number + 1)),
        (f"in/{number}.txt", f"{prompt} {number}\n"),
    ]


def told(source):
    return [(p.pair_id, p.prompt, p.winner(), p.loser()) for p in source]


def expected(number):
    images = image_bytes(2 * number), image_bytes(2 * number + 1)
    return (f"in/{number}", f"a boat {number}", *images)


def test_pairs_of_several_shards(tmp_path):
    write_tar(tmp_path / "train-000000.tar", [*pair(0), *pair(1)])
    write_tar(tmp_path / "train-000001.tar", pair(2))
    write_tar(tmp_path / "test-000000.tar", pair(3))
    assert told(opened(tmp_path)) == [expected(number) for number in range(3)]
    assert told(opened(tmp_path).pairs(1, 2)) == [expected(1)]
    assert told(opened(tmp_path, limit=2)) == [expected(0), expected(1)]
    assert told(opened(tmp_path, split="test")) == [expected(3)]
    assert told(opened(tmp_path / "test-000000.tar")) == [expected(3)]
    assert opened(tmp_path).prompt_table().prompts == ["", "a boat 0", "a boat 1", "a boat 2"]


@pytest.mark.parametrize(
    "names", [("jpg_0", "jpg_1"), ("0.png", "1.png"), ("image_0.JPG", "image_1.JPG")]
)
def test_labels_say_which_of_two_images_won(tmp_path, names):
    files = []
    for number, label in enumerate([1, 0, 0.5, None, "x"]):
        other = 1 - label if isinstance(label, int | float) else label
        about = {"caption": f"p{number}", "label_0": label, "label_1": other}
        files += [
            (f"{number}.{name}", image_bytes(10 * number + k)) for k, name in enumerate(names)
        ]
        files.append((f"{number}.json", json.dumps(about)))
    write_tar(tmp_path / "shard.tar", files)
    source = opened(tmp_path)
    assert told(source) == [
        ("0", "p0", image_bytes(0), image_bytes(1)),
        ("1", "p1", image_bytes(11), image_bytes(10)),
    ]
    report = source.report
    assert (report.rows, report.ties, report.bad + report.unlabeled) == (5, 1, 2)


def test_keys_that_lack_something_are_left_out(tmp_path):
    lacking = [file for file in pair(1) if not file[0].endswith("txt")]
    wrong = [*pair(2)[:2], ("in/2.txt", b"\xff\xfe")]
    named = [("in/3.json", json.dumps({"prompt": "x", "winner": "a.png", "loser": "b.png"}))]
    write_tar(tmp_path / "train-0.tar", [*pair(0), *lacking, *wrong, *named, *pair(4), *pair(5)])
    source = opened(tmp_path)
    assert told(source) == [expected(k) for k in (0, 4, 5)]
    assert [row.place for row in source.bad.kept] == [f"train-0.tar: in/{k}" for k in (1, 2, 3)]
    assert "missing column prompt" in source.bad.kept[0].reason
    assert "'a.png' is no image of this key" in source.bad.kept[2].reason


def test_other_tar_files_are_refused_by_name(tmp_path):
    path = write_tar(tmp_path / "train-0.tar", pair(0), mode="w:gz")
    with pytest.raises(DataError, match=r"train-0\.tar is not a readable tar file, or compressed"):
        opened(tmp_path)
    path.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match=r"train-0\.tar is not a readable tar file"):
        opened(tmp_path)


def test_digest_and_stamp_follow_the_files(tmp_path):
    config = DataConfig(source="folder", path=str(tmp_path))
    assert source_digest(config) is None and source_stamp(config) is None
    write_tar(tmp_path / "train-0.tar", pair(0))
    digest, stamp = source_digest(config), source_stamp(config)
    write_tar(tmp_path / "train-0.tar", [*pair(0), *pair(1)])
    assert source_digest(config) != digest and source_stamp(config) != stamp


@pytest.mark.usefixtures("one_thread")
def test_a_cache_is_made_of_tar_files(config_for, tmp_path):
    broken = [("in/1.winner.png", b"broken"), *pair(1)[1:]]
    write_tar(tmp_path / "data" / "train-0.tar", [*pair(0), *broken])
    write_tar(tmp_path / "data" / "train-1.tar", pair(2))
    cache = prepare(config_for(), progress=False)
    assert cache.pair_ids == ["in/0", "in/2"]
    assert cache.summary().startswith("2 of 3 pairs; left out: 1 bad row or image")
