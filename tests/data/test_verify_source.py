"""Preparing again: images that changed since they were encoded are noticed."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fastpo.data.sources.folder as folder_module
from fastpo.data.cache import PairCache
from fastpo.data.cache.manifest import load_manifest
from fastpo.data.prepare import prepare, verify_source
from fastpo.data.sources import source_stamps
from fastpo.data.sources.files import DataFolder
from fastpo.errors import CacheError
from fastpo.models.encoders import Encoders
from fastpo.testing import pickapic_row, write_folder, write_pickapic

pytestmark = pytest.mark.usefixtures("one_thread")


def other_image(path):
    """Another file of the same name and size, which is an image too."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def copied(folder):
    """As copying a data set leaves it: the same bytes, other times."""
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("source", ["folder", "hpdv2", "pickapic"])
def test_other_images_under_the_same_names_are_refused(config_for, tmp_path, source):
    data = tmp_path / "data"
    if source == "pickapic":
        file = write_pickapic(data / "train-0.parquet", [pickapic_row(i) for i in range(5)])
        name, changed = "1002:uid-4:uid-5", [pickapic_row(i) for i in range(5)]
        changed[2]["jpg_0"] = changed[2]["jpg_0"][:-2] + b"\xff\xd8"

        def change():
            size = file.stat().st_size
            write_pickapic(file, changed)
            assert file.stat().st_size == size

    else:
        file, name = write_folder(data, 5) / "winner2.png", "p2"
        change = partial(other_image, file)
    if source == "hpdv2":
        entries = [
            {
                "prompt": f"prompt {i}",
                "file_path": [f"winner{i}.png", f"loser{i}.png"],
                "human_preference": [1, 0],
            }
            for i in range(5)
        ]
        (data / "train.json").write_text(json.dumps(entries))
        name = "winner2.png:loser2.png"
    config = config_for(data={"source": source})
    first = prepare(config, progress=False)
    change()
    with pytest.raises(CacheError, match=rf"1 pair\(s\) of .* other images .*: {name}"):
        prepare(config, progress=False)
    # Training needs no images.
    assert PairCache.open(config).fingerprint == first.fingerprint


def test_a_copied_data_set_is_read_once_and_then_known(config_for, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", 5)
    (data / "loser3.png").unlink()  # in quarantine, and not there
    monkeypatch.setattr("fastpo.data.sources.folder.FolderSource._scan", scan_without_looking)
    first = prepare(config_for(), progress=False)
    copied(data)
    reads = []
    original = verify_source.read_image
    monkeypatch.setattr(verify_source, "read_image", lambda read: reads.append(1) or original(read))
    for _ in range(2):
        assert prepare(config_for(), progress=False).fingerprint == first.fingerprint
        assert len(reads) == 10


def scan_without_looking(self):
    """A scan of a data set from which an image has vanished since."""
    self._file = Path(self.config.path) / "pairs.jsonl"
    lines = list(folder_module.listed(self._file))[: self.config.limit]
    self._places = np.array([place for _, place, _ in lines])
    self._images = DataFolder(Path(self.config.path), allow_outside=False)
    self.report.rows = self.report.pairs = len(lines)


def test_an_image_changed_between_two_sittings_is_found(config_for, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", 6)
    original, calls = Encoders.encode_images, iter(range(2))

    def stop(self, pixels):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(Encoders, "encode_images", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config_for(prepare={"workers": 0}), progress=False)
    monkeypatch.undo()
    done = data / "winner0.png"
    before = done.read_bytes()
    other_image(done)
    other_image(data / "loser5.png")  # not encoded yet
    with pytest.raises(CacheError, match=r"1 pair\(s\) .*: p0"):
        prepare(config_for(), progress=False)
    done.write_bytes(before)
    assert len(prepare(config_for(), progress=False)) == 6
    # Within a smaller limit not all is compared, so a later look at all is one more.
    other_image(data / "loser5.png")
    assert len(prepare(config_for(data={"limit": 2}), progress=False)) == 2
    with pytest.raises(CacheError, match=r"1 pair\(s\) .*: p5"):
        prepare(config_for(), progress=False)


def test_a_cache_from_before_digests_were_kept_is_taken_as_it_is(config_for, tmp_path):
    write_folder(tmp_path / "data", 4)
    first = prepare(config_for(), progress=False)
    for path in (tmp_path / "cache").glob("shard-*/record.json"):
        record = json.loads(path.read_text())
        del record["contents"], record["checksum"]
        path.write_text(json.dumps(record))
    manifest = tmp_path / "cache" / "manifest.json"
    about = json.loads(manifest.read_text())
    del about["stamp"], about["checksum"], about["beside"]
    manifest.write_text(json.dumps(about))
    assert prepare(config_for(), progress=False).fingerprint == first.fingerprint


@pytest.mark.parametrize("source", ["folder", "pickapic"])
def test_another_spelling_of_the_folder_is_the_same_data(config_for, tmp_path, monkeypatch, source):
    """Nothing is read again: of another folder's name, of one with a slash, of one that moved."""
    monkeypatch.chdir(tmp_path)
    if source == "folder":
        write_folder(tmp_path / "d2", 3)
    else:
        write_pickapic(tmp_path / "d2" / "train-0.parquet", [pickapic_row(i) for i in range(3)])
    first = prepare(config_for(data={"path": "d2", "source": source}), progress=False)
    monkeypatch.setattr(verify_source, "read_image", lambda _: pytest.fail("read again"))
    monkeypatch.setattr("fastpo.data.prepare.latents.open_source", lambda _: pytest.fail("opened"))
    (tmp_path / "link").symlink_to("d2")
    (tmp_path / "in").mkdir()
    for place in ("d2", "./d2/", "d2/.", "in/../d2", str(tmp_path / "d2"), "link"):
        cache = prepare(config_for(data={"path": place, "source": source}), progress=False)
        assert cache.fingerprint == first.fingerprint
    (tmp_path / "d2").rename(tmp_path / "in" / "moved")
    config = config_for(data={"path": "in/moved", "source": source})
    assert prepare(config, progress=False).fingerprint == first.fingerprint


def test_the_stamp_of_earlier_versions_is_known(config_for, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", 3)
    config = config_for()
    prepare(config, progress=False)
    manifest = load_manifest(config.prepare.cache_dir)
    manifest.stamp = source_stamps(config.data)[1]
    manifest.save(config.prepare.cache_dir)
    monkeypatch.setattr(verify_source, "read_image", lambda _: pytest.fail("read again"))
    prepare(config, progress=False)
