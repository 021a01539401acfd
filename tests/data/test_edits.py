"""Pairs that begin from a source image: sources, cache, and what is refused."""

import io
import json
import tarfile
from unittest.mock import patch

import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from fastpo.config import DataConfig, parse_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.manifest import load_manifest
from fastpo.data.prepare import prepare
from fastpo.data.sources import open_source
from fastpo.errors import CacheError, ConfigError, DataError
from fastpo.evaluate.sampling import ImageSampler, plan_samples
from fastpo.models.encoders import Encoders
from fastpo.models.flux2 import Flux2Encoders
from fastpo.models.folder import ModelFolder
from fastpo.noise import dropped_conditions
from fastpo.review.decide import Decision
from fastpo.review.relabel import Shards
from fastpo.system.pictures import UnusableImageError
from fastpo.testing import image_bytes, write_folder
from fastpo.testing.edits import small_sources
from fastpo.testing.flow import tiny_flux_kontext_folder

SOURCES = (90, 50), (60, 44), (180, 101)
"""The first and the last get one size."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with small_sources():
        yield tiny_flux_kontext_folder(tmp_path_factory.mktemp("model"))


def config_of(model, path, cache, **options):
    return parse_config(
        {
            "model": {"path": str(model)},
            "data": {"source": "folder", "path": str(path), **options.pop("data", {})},
            "prepare": {
                "cache_dir": str(cache),
                "resolution": 64,
                "store_precision": "fp32",
                "text_length": 16,
                **options,
            },
            "train": {"output_dir": "unused", "objective": {"name": "dpo"}, "max_steps": 1},
        }
    )


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """Six pairs of three source images, prepared; parts of two pairs, or of two images."""
    folder = tmp_path_factory.mktemp("edits")
    write_folder(folder / "data", 6, sizes=((64, 64),), sources=SOURCES)
    config = config_of(model, folder / "data", folder / "cache", shard_size=2)
    return config, prepare(config, progress=False)


def rewrite(data, change):
    """Changes the rows of a folder's listing."""
    listing = data / "pairs.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    for number, row in enumerate(rows):
        change(number, row)
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_source_is_stored_once_and_read_with_its_pairs(made, model):
    config, cache = made
    encoders = Encoders.load(config, model=ModelFolder(model))
    manifest = load_manifest(config.prepare.cache_dir)
    assert [(span.start, span.stop) for span in manifest.images] == [(0, 2), (2, 3)]
    assert cache.source_images.tolist() == [0, 1, 2, 0, 1, 2]
    for row in range(6):
        image = Image.open(f"{config.data.path}/source{row % 3}.png").convert("RGB")
        expected = encoders.encode_sources(encoders.source_pixels(image).unsqueeze(0))
        found = cache.read([row], 0).conditions["source_latents"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_pairs_of_a_batch_have_sources_of_one_size(made):
    _, cache = made
    assert len(cache.latent_shapes) == 2
    assert cache.latent_shapes[0] == cache.latent_shapes[1]
    bucket = cache.bucket.tolist()
    assert bucket[0] == bucket[2] == bucket[3] == bucket[5] != bucket[1] == bucket[4]
    latents = cache.read([0, 2, 5], 0).conditions["source_latents"]
    assert latents.shape[0] == 3
    assert torch.equal(latents[1], latents[2])
    assert not torch.equal(latents[0], latents[1])


def test_a_damaged_source_latent_is_told_and_made_again(made, tmp_path, model):
    folder = tmp_path / "edits"
    write_folder(folder / "data", 2, sizes=((64, 64),), sources=SOURCES[:1])
    config = config_of(model, folder / "data", folder / "cache")
    before = prepare(config, progress=False).read([0], 0)
    file = folder / "cache" / "image-00000" / "latents.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheError, match="image-00000"):
        PairCache.open(config).read([0], 0)
    always = config.model_copy(update={"data": config.data.model_copy(update={"verify": "always"})})
    after = prepare(always, progress=False).read([0], 0)
    assert torch.equal(before.conditions["source_latents"], after.conditions["source_latents"])


def test_a_cache_of_more_pairs_keeps_what_is_encoded(tmp_path, model):
    write_folder(tmp_path / "data", 4, sizes=((64, 64),), sources=SOURCES)
    small = config_of(model, tmp_path / "data", tmp_path / "cache", data={"limit": 2}, shard_size=1)
    first = prepare(small, progress=False).read([0], 0)
    part = tmp_path / "cache" / "image-00000" / "record.json"
    stamp = part.stat().st_mtime_ns
    whole = config_of(model, tmp_path / "data", tmp_path / "cache", shard_size=1)
    cache = prepare(whole, progress=False)
    assert cache.source_images.tolist() == [0, 1, 2, 0]
    assert part.stat().st_mtime_ns == stamp
    again = cache.read([0], 0).conditions["source_latents"]
    assert torch.equal(again, first.conditions["source_latents"])


def test_pairs_of_a_source_that_is_no_image_are_left_out_until_it_is_repaired(tmp_path, model):
    write_folder(tmp_path / "data", 4, sizes=((64, 64),), sources=SOURCES[:2])
    whole = (tmp_path / "data" / "source1.png").read_bytes()
    (tmp_path / "data" / "source1.png").write_bytes(b"no image")
    config = config_of(model, tmp_path / "data", tmp_path / "cache", data={"max_bad": 0.5})
    cache = prepare(config, progress=False)
    assert list(cache.pair_ids) == ["p0", "p2"]
    assert "source: UnidentifiedImageError" in cache.left_out()
    (tmp_path / "data" / "source1.png").write_bytes(whole)
    repaired = prepare(config, progress=False, retry_quarantined=True)
    assert list(repaired.pair_ids) == ["p0", "p1", "p2", "p3"]
    assert repaired.read([1], 0).conditions["source_latents"].abs().sum() > 0


def test_a_strip_is_no_source(tmp_path, model):
    write_folder(tmp_path / "data", 2, sizes=((64, 64),), sources=SOURCES[:2])
    (tmp_path / "data" / "source1.png").write_bytes(image_bytes(0, (153, 3)))
    config = config_of(model, tmp_path / "data", tmp_path / "cache", data={"max_bad": 0.5})
    cache = prepare(config, progress=False)
    assert "source: its sides are more than 1 to 50: (153, 3)" in cache.left_out()


def test_a_missing_source_stops_before_any_model_is_loaded(tmp_path, model, monkeypatch):
    write_folder(tmp_path / "data", 2, sizes=((64, 64),), sources=SOURCES[:2])
    (tmp_path / "data" / "source1.png").unlink()
    monkeypatch.setattr(Encoders, "load", None)
    config = config_of(model, tmp_path / "data", tmp_path / "cache", data={"max_bad": 0})
    with pytest.raises(DataError, match=r"pair 1 \(from 0\): source image not found: .*source1"):
        prepare(config, progress=False)


def test_a_source_that_is_no_path_is_told_where_images_are_edited(tmp_path, model, monkeypatch):
    data = write_folder(tmp_path / "data", 2, sizes=((64, 64),), sources=SOURCES[:1])
    first, second = (json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines())
    second["source"] = 5
    (data / "pairs.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    monkeypatch.setattr(Encoders, "load", None)
    told = r"pair 1 \(from 0\): source is 5; expected the image's path, or a list of paths"
    with pytest.raises(DataError, match=told):
        prepare(config_of(model, data, tmp_path / "cache"), progress=False)
    (data / "pairs.jsonl").rename(data / "metadata.jsonl")
    with pytest.raises(DataError, match=told):
        prepare(config_of(model, data, tmp_path / "cache"), progress=False)


def test_a_model_that_edits_needs_a_source_for_every_pair(tmp_path, model):
    write_folder(tmp_path / "none", 2, sizes=((64, 64),))
    with pytest.raises(DataError, match="flux-kontext edits source images, and none are given"):
        prepare(config_of(model, tmp_path / "none", tmp_path / "a"), progress=False)
    write_folder(tmp_path / "some", 3, sizes=((64, 64),), sources=SOURCES[:1])
    rewrite(tmp_path / "some", lambda number, row: row.pop("source") if number == 1 else None)
    with pytest.raises(DataError, match=r"1 of 3 pairs have no source image, the first is pair 1"):
        prepare(config_of(model, tmp_path / "some", tmp_path / "b"), progress=False)


def test_a_model_that_edits_nothing_refuses_sources(tmp_path, tiny_pipelines):
    write_folder(tmp_path / "data", 2, sources=SOURCES[:1])
    config = config_of(tiny_pipelines["sd15"], tmp_path / "data", tmp_path / "cache")
    config = parse_config(
        {
            **config.model_dump(mode="json"),
            "prepare": {"cache_dir": str(tmp_path / "cache"), "resolution": 64},
        }
    )
    with pytest.raises(DataError, match="source images are given, and sd15 edits no images"):
        prepare(config, progress=False)
    # A column of that name that holds no image is none of its business, as ever.
    rewrite(tmp_path / "data", lambda number, row: row.update(source="a web page"))
    assert len(prepare(config, progress=False)) == 2


def test_a_source_outside_of_the_folder_is_refused(tmp_path, model):
    write_folder(tmp_path / "data", 1, sizes=((64, 64),), sources=SOURCES[:1])
    rewrite(tmp_path / "data", lambda number, row: row.update(source="../elsewhere.png"))
    config = config_of(model, tmp_path / "data", tmp_path / "cache", data={"max_bad": 0})
    with pytest.raises(DataError, match=r"leads out of .*allow_outside"):
        prepare(config, progress=False)


def test_another_source_under_the_same_name_is_found_out(tmp_path, model):
    write_folder(tmp_path / "data", 1, sizes=((64, 64),), sources=SOURCES[:1])
    config = config_of(model, tmp_path / "data", tmp_path / "cache")
    prepare(config, progress=False)
    (tmp_path / "data" / "source0.png").write_bytes(image_bytes(5, (60, 60)))
    with pytest.raises(CacheError, match="other images or prompts"):
        prepare(config, progress=False)


@pytest.mark.parametrize(
    ("size", "text"), [((63, 90), "at least 64px"), ((640, 70), "Aspect ratio too extreme")]
)
def test_a_source_that_flux2s_pipeline_refuses_is_unusable(size, text):
    image = Image.new("RGB", size)
    with pytest.raises(ValueError, match=text):
        Flux2ImageProcessor.check_image_input(image)
    with pytest.raises(UnusableImageError, match=text):
        Flux2Encoders.check_source(None, image)


def test_a_relabeled_copy_keeps_the_sources(tmp_path):
    write_folder(tmp_path / "data", 2, sources=SOURCES[:1])
    (tmp_path / "out").mkdir()
    shards = Shards(tmp_path / "out")
    with shards.closing():
        for pair in open_source(DataConfig(source="folder", path=str(tmp_path / "data"))):
            assert shards.add(pair, Decision()) is None
    copied = open_source(DataConfig(source="folder", path=str(tmp_path / "out")))
    expected = (tmp_path / "data" / "source0.png").read_bytes()
    assert [[read() for read in pair.source_images] for pair in copied] == [[expected]] * 2
    assert copied.source_images().numbers.tolist() == [0, 0]


def test_prompts_of_edits_come_with_their_sources(tmp_path, model, tiny_pipelines):
    write_folder(tmp_path / "data", 3, prompts=1, sources=SOURCES[:2])
    listing = str(tmp_path / "data" / "pairs.jsonl")

    def sampler(path, **evaluate):
        raw = config_of(path, tmp_path / "data", tmp_path / "cache").model_dump(mode="json")
        raw["prepare"]["text_length"] = None
        config = parse_config({**raw, "evaluate": {"seeds_per_prompt": 1, **evaluate}})
        return ImageSampler(config, progress=False), plan_samples(config)

    edits, samples = sampler(model, prompts_file=listing)
    places = [str(tmp_path / "data" / f"source{k}.png") for k in range(2)]
    assert [(s.prompt, s.sources) for s in samples] == [("prompt 0", (p,)) for p in places]
    before = edits.fingerprint(samples)
    assert edits.fingerprint(samples[:1]) != before
    (tmp_path / "data" / "source0.png").write_bytes(image_bytes(9, (60, 60)))
    assert edits.fingerprint(samples) != before, "another image under the same name"
    with pytest.raises(DataError, match="flux-kontext edits source images, and none are given"):
        edits.check(sampler(model, prompts=["a cat"])[1])
    with pytest.raises(DataError, match="source images are given, and sd15 edits no images"):
        sampler(tiny_pipelines["sd15"], prompts=["a"])[0].check(samples)
    with pytest.raises(ConfigError, match="'a cat' has no source image, others have"):
        sampler(model, prompts=["a cat"], prompts_file=listing)


def test_dropped_captions_need_a_text_without_its_image(made, model):
    config, _ = made
    train = config.train.model_copy(update={"empty_prompt_rate": 0.1})
    dropping = config.model_copy(update={"train": train})
    empty = {"prompt_embeds": torch.ones(1, 2, 3)}
    folder = ModelFolder(model)
    assert dropped_conditions(dropping, folder, empty).keys() == empty.keys()
    with (
        patch.object(type(folder.family), "text_sees_source", True),
        pytest.raises(ConfigError, match="empty_prompt_rate: prompts of flux-kontext are encoded"),
    ):
        dropped_conditions(dropping, folder, empty)


def write_csv(folder, rows):
    lines = ["prompt,winner,loser,source"] + [
        f"p{i},winner{i}.png,loser{i}.png,source{i}.png" for i in range(rows)
    ]
    (folder / "pairs.csv").write_text("\n".join(lines))
    (folder / "pairs.jsonl").unlink()


def write_tar(folder, rows):
    (folder / "pairs.jsonl").unlink()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for i in range(rows):
            content = {"txt": b"a prompt"}
            for side in ("winner", "loser", "source"):
                content[f"{side}.png"] = (folder / f"{side}{i}.png").read_bytes()
            for name, data in content.items():
                member = tarfile.TarInfo(f"{i}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("write", [write_csv, write_tar])
def test_other_listings_name_sources_too(tmp_path, write):
    write_folder(tmp_path, 2, sources=SOURCES[:2])
    sources = [(tmp_path / f"source{k}.png").read_bytes() for k in range(2)]
    write(tmp_path, 2)
    source = open_source(DataConfig(source="folder", path=str(tmp_path)))
    assert source.edits()
    images = source.source_images()
    assert images.numbers.tolist() == [0, 1]
    assert [images.read(k) for k in range(2)] == sources
    assert [[read() for read in pair.source_images] for pair in source] == [[s] for s in sources]


def test_several_data_sets_keep_their_own_sources(tmp_path):
    for name, sources in (("a", SOURCES[:2]), ("b", SOURCES[2:])):
        write_folder(tmp_path / name, 2, sources=sources)
    each = [{"source": "folder", "path": str(tmp_path / name)} for name in "ab"]
    images = open_source(DataConfig(sources=each)).source_images()
    assert images.names == ["a/source0.png", "a/source1.png", "b/source0.png"]
    assert images.numbers.tolist() == [0, 1, 2, 2]
    assert images.read(2) == (tmp_path / "b" / "source0.png").read_bytes()
    write_folder(tmp_path / "c", 1)
    mixed = [*each, {"source": "folder", "path": str(tmp_path / "c")}]
    with pytest.raises(DataError, match="pairs of a, b have source images, those of c have none"):
        open_source(DataConfig(sources=mixed)).source_images()
