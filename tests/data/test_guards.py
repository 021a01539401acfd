"""Bounds on what a data set may hold: each is refused in one line that names it."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

import fastpo.data.sources.files as files
import fastpo.data.sources.folder as folder_module
import fastpo.data.sources.hpdv2 as hpdv2_module
import fastpo.system.pictures as images
from fastpo.config import DataConfig
from fastpo.data.images import UnusableImageError, decode, load_pair
from fastpo.data.prepare.verify_source import read_image
from fastpo.data.sources import open_source
from fastpo.errors import ConfigError, DataError
from fastpo.evaluate.sampling import plan_samples
from fastpo.models.geometry import make_geometry
from fastpo.testing import image_bytes, pickapic_row, write_folder, write_pickapic
from fastpo.types import MOST_PROMPT

GEOMETRY = make_geometry(32, use_buckets=True, vae_factor=4, denoiser_factor=2)


def encoded(image, encoding):
    buffer = io.BytesIO()
    image.save(buffer, encoding)
    return buffer.getvalue()


@pytest.mark.parametrize("encoding", ["TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_not_decoded(encoding):
    with pytest.raises(UnusableImageError, match="no JPEG, PNG, WEBP, GIF or BMP image"):
        decode(encoded(Image.new("RGB", (8, 8)), encoding))


@pytest.mark.parametrize("encoding", images.FORMATS)
def test_formats_that_are_meant_are_decoded(encoding):
    assert decode(encoded(Image.new("RGB", (8, 6)), encoding)).size == (8, 6)


def test_the_size_is_looked_at_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 100)
    data, flat = image_bytes(0, (11, 10)), image_bytes(0, (11, 2))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnusableImageError, match=r"11x10 are more than 0\.0001 megapixels"):
        decode(data)
    monkeypatch.setattr(images, "MOST_SIDE", 10)
    with pytest.raises(UnusableImageError, match="or than 10 on a side"):
        decode(flat)


def test_of_a_strip_only_what_is_kept_is_resized(monkeypatch):
    ramp = np.tile(np.arange(640, dtype=np.uint16)[None, :, None] // 4, (8, 1, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(ramp), "PNG")
    sizes, resize = [], Image.Image.resize

    def spy(self, size, *arguments, **options):
        sizes.append(size)
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    pair = load_pair(lambda: data, lambda: data, GEOMETRY)
    (height, width) = pair.pixels.shape[-2:]
    assert sizes == [(width, height)] * 2
    monkeypatch.setattr("fastpo.data.images.MOST_ENLARGED", 10**9)
    whole = load_pair(lambda: data, lambda: data, GEOMETRY)
    assert whole.add_time_ids == pair.add_time_ids
    assert (whole.pixels.int() - pair.pixels.int()).abs().max() <= 1


def test_a_file_that_is_no_image_s_size_or_kind_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_IMAGE_BYTES", 10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    os.mkfifo(tmp_path / "pipe")
    for name, text in (("large", "at most 10 are read"), ("pipe", "no regular file")):
        found = read_image(lambda name=name: files.read_image_file(tmp_path / name))
        assert isinstance(found, OSError) and text in str(found)
    (tmp_path / "fits").write_bytes(b"x" * 10)
    assert files.read_image_file(tmp_path / "fits") == b"x" * 10


def opened(path, **options):
    return open_source(DataConfig(source="folder", path=str(path), **options))


def with_line(folder, **changes):
    listing = folder / "pairs.jsonl"
    first, *rest = listing.read_text().splitlines()
    listing.write_text("\n".join([json.dumps(json.loads(first) | changes), *rest]) + "\n")


def test_a_prompt_beyond_the_bound_is_named_with_its_length(tmp_path, config_for):
    data = write_folder(tmp_path / "data", 2)
    with_line(data, prompt="x" * MOST_PROMPT)
    opened(data).prompt_table()
    with_line(data, prompt="x" * (MOST_PROMPT + 1))
    with pytest.raises(DataError, match=r"pair 0 \(from 0\): its prompt has 20,001 characters"):
        opened(data, max_bad=0).prompt_table()
    left_out, other = opened(data)
    assert "20,001 characters" in left_out.fault and left_out.prompt == "" and other.fault is None
    assert opened(data).prompt_table().prompts == ["", "prompt 1"]
    write_pickapic(tmp_path / "p" / "train-0.parquet", [pickapic_row(0, caption="y" * 20_001)])
    with pytest.raises(DataError, match="its prompt has 20,001 characters"):
        open_source(DataConfig(source="pickapic", path=str(tmp_path / "p"))).prompt_table()
    with pytest.raises(ConfigError, match="has 20,001 characters, at most 20,000"):
        plan_samples(config_for(evaluate={"prompts": ["z" * 20_001]}))


def test_lines_and_listings_are_bounded(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", 2)
    monkeypatch.setattr(folder_module, "MOST_LINE", 400)
    with_line(data, prompt="x" * 400)
    with pytest.raises(DataError, match="line 1: it has more than 400 bytes"):
        opened(data, max_bad=0)
    assert [pair.pair_id for pair in opened(data)] == ["p1"], "the rest of the line is passed over"
    with_line(data, prompt="x", extra=json.loads("[" * 20 + "]" * 20))
    opened(data)
    with_line(data, prompt="x", extra=json.loads("[" * 65 + "]" * 65))
    with pytest.raises(DataError, match="line 1: not valid JSON: it is nested more than 64"):
        opened(data, max_bad=0)
    monkeypatch.setattr(hpdv2_module, "MOST_BYTES", 10)
    (tmp_path / "train.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(DataError, match="it has 12 bytes, at most 10 are read"):
        open_source(DataConfig(source="hpdv2", path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["absolute", "parent", "link", "linked folder"])
def test_a_listing_names_files_in_its_folder_unless_it_may_name_others(tmp_path, kind):
    data = write_folder(tmp_path / "data", 2)
    outside = write_folder(tmp_path / "outside", 1) / "winner0.png"
    if kind == "link":
        (data / "link.png").symlink_to(outside)
    if kind == "linked folder":
        (data / "more").symlink_to(outside.parent)
    names = {"absolute": str(outside), "parent": "../outside/winner0.png", "link": "link.png"}
    name = names.get(kind, "more/winner0.png")
    with_line(data, winner=name)
    words = "a link out of" if "link" in kind else "leads out of"
    with pytest.raises(DataError, match=rf"line 1: winner image '{name}'.*{words}.*allow_outside"):
        opened(data)
    source = opened(data, allow_outside=True)
    assert next(iter(source)).winner() == outside.read_bytes()
    entry = {"prompt": "p", "file_path": ["winner1.png", name], "human_preference": [1, 0]}
    (data / "train.json").write_text(json.dumps([entry]))
    hpdv2 = DataConfig(source="hpdv2", path=str(data))
    with pytest.raises(DataError, match=words):
        next(iter(open_source(hpdv2))).loser()
    allowed = open_source(hpdv2.model_copy(update={"allow_outside": True}))
    assert next(iter(allowed)).loser() == outside.read_bytes()


def test_a_snapshot_in_the_hubs_cache_is_read(tmp_path):
    """Its files are links to `blobs`, two levels up; other links out of it are still named."""
    snapshot = write_folder(tmp_path / "datasets--own--pairs" / "snapshots" / "0123abcd", 2)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    source = opened(snapshot)
    assert [pair.pair_id for pair in source] == ["p0", "p1"]
    assert next(iter(source)).winner()
    (snapshot / "winner0.png").unlink()
    (snapshot / "winner0.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "elsewhere.png").write_bytes((snapshot / "winner1.png").read_bytes())
    with pytest.raises(DataError, match=r"winner0\.png'? is, or lies behind, a link out of"):
        next(iter(opened(snapshot))).winner()


def test_links_within_the_folder_are_followed(tmp_path):
    data = write_folder(tmp_path / "data", 2)
    (data / "inner").mkdir()
    (data / "inner" / "link.png").symlink_to("../winner1.png")
    (tmp_path / "other name").symlink_to(data)
    with_line(data, winner="inner/link.png")
    for path in (data, tmp_path / "other name"):
        assert next(iter(opened(path))).winner() == (data / "winner1.png").read_bytes()
