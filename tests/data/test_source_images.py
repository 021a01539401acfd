"""Pairs that begin from several source images, tables that hold them, and caches that give them."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastpo.config import DataConfig, parse_config
from fastpo.data.cache.tensors import TensorFiles
from fastpo.data.cache.texts import TextRows, without_padding
from fastpo.data.prepare import prepare
from fastpo.data.sources import open_source
from fastpo.errors import DataError
from fastpo.evaluate.sampling import ImageSampler, plan_samples
from fastpo.models.edits import EditEncoders
from fastpo.models.encoders import Encoders
from fastpo.models.folder import ModelFolder
from fastpo.plan.dataset import find_size
from fastpo.review.decide import Decision
from fastpo.review.relabel import Shards
from fastpo.testing import image_bytes, write_folder
from fastpo.testing.edits import small_sources
from fastpo.testing.flow import tiny_flux_kontext_folder
from fastpo.testing.language_pipelines import tiny_flux2_klein_folder, tiny_qwen_image_edit_folder

SIZES = (96, 64), (64, 80), (96, 64), (64, 80)
SEES = "qwen"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """FLUX.2, whose texts see no source, and Qwen-Image-Edit-Plus, whose texts do."""
    folder = tmp_path_factory.mktemp("models")
    with small_sources():
        yield {
            "flux2": tiny_flux2_klein_folder(folder / "flux2"),
            SEES: tiny_qwen_image_edit_folder(folder / SEES, plus=True),
        }


def config_of(model, path, cache, *, limit=None, **prepared):
    return parse_config(
        {
            "model": {"path": str(model)},
            "data": {"source": "folder", "path": str(path), "limit": limit},
            "prepare": {
                "cache_dir": str(cache),
                "resolution": 64,
                "store_precision": "fp32",
                "text_length": 16,
                **prepared,
            },
            "train": {"output_dir": "unused", "objective": {"name": "dpo"}, "max_steps": 1},
        }
    )


def change_rows(data, change):
    listing = data / "pairs.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    for number, row in enumerate(rows):
        change(number, row)
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_mixed(data):
    """Four pairs of one or two of four sources."""
    write_folder(data, 4, prompts=2, sizes=((64, 64),), sources=SIZES, together=2)
    named = [["source0.png"], ["source0.png", "source1.png"], ["source2.png", "source3.png"], None]
    named[3] = ["source1.png", "source0.png"]
    change_rows(data, lambda number, row: row.update(source=named[number]))
    return data


@pytest.fixture(scope="module")
def mixed(models, tmp_path_factory):
    """The mixed pairs, prepared first in part, a pair a shard: the first pair has one source."""
    folder = tmp_path_factory.mktemp("mixed")
    data = write_mixed(folder / "data")
    caches = {}
    for name, model in models.items():
        for limit in (1, None):
            config = config_of(model, data, folder / name, limit=limit, shard_size=1)
            caches[name] = config, prepare(config, progress=False)
    return caches


@pytest.mark.parametrize("name", ["flux2", SEES])
def test_a_pair_comes_with_its_sources_in_their_order(mixed, models, name):
    config, cache = mixed[name]
    encoders = Encoders.load(config, model=ModelFolder(models[name]))
    opened = [Image.open(f"{config.data.path}/source{k}.png").convert("RGB") for k in range(4)]
    expected = [encoders.encode_sources(encoders.source_pixels(i).unsqueeze(0)) for i in opened]
    assert [cache.sources_of(row) for row in range(4)] == [(0,), (0, 1), (2, 3), (1, 0)]
    for row in range(4):
        conditions = cache.read([row], 0).conditions
        names = ["source_latents", "source_latents_2"][: len(cache.sources_of(row))]
        assert names == [name for name in conditions if name.startswith("source")]
        for condition, number in zip(names, cache.sources_of(row), strict=True):
            torch.testing.assert_close(
                conditions[condition], expected[number], atol=1e-5, rtol=1e-5
            )


def test_pairs_of_a_batch_have_as_many_sources_of_the_same_sizes(mixed):
    _, cache = mixed["flux2"]
    bucket = cache.bucket.tolist()
    assert bucket[1] == bucket[2]
    assert len(set(bucket)) == 3, "one source; two; the same two the other way round"
    assert cache.read([1, 2], 0).conditions["source_latents_2"].shape[0] == 2


def test_texts_see_all_sources_in_their_order(mixed, models):
    config, cache = mixed[SEES]
    encoders = Encoders.load(config, model=ModelFolder(models[SEES]))
    opened = [Image.open(f"{config.data.path}/source{k}.png").convert("RGB") for k in range(4)]
    lengths = []
    for row in range(4):
        images = [opened[number] for number in cache.sources_of(row)]
        expected = encoders.encode_edit(f"prompt {row % 2}", images)
        found = cache.read([row], 0).conditions
        lengths.append(int(found["prompt_mask"].sum()))
        own = found["prompt_embeds"][:, : lengths[-1]]
        torch.testing.assert_close(
            own, expected["prompt_embeds"][:, : lengths[-1]], atol=1e-5, rtol=1e-5
        )
        assert int(expected["prompt_mask"].sum()) == lengths[-1]
    assert lengths[0] < min(lengths[1:])


def test_the_plan_counts_every_source(mixed):
    for config, _ in mixed.values():
        size = find_size(config, None)
        assert (size.pairs, size.images, size.sources) == (4, 4, 2)


def test_a_model_of_one_source_refuses_two_before_it_is_loaded(tmp_path, monkeypatch):
    model = tiny_flux_kontext_folder(tmp_path / "model")
    write_folder(tmp_path / "data", 2, sizes=((64, 64),), sources=SIZES, together=2)
    monkeypatch.setattr(Encoders, "load", None)
    text = "2 source images are given to a pair, and flux-kontext takes 1 at most"
    with pytest.raises(DataError, match=text):
        prepare(config_of(model, tmp_path / "data", tmp_path / "cache"), progress=False)


@pytest.fixture
def encoded(monkeypatch):
    """Source images and texts that are encoded."""
    seen = {"sources": 0, "texts": []}
    sources, text = EditEncoders.encode_sources, EditEncoders.encode_edit

    def count_sources(self, pixels):
        seen["sources"] += len(pixels)
        return sources(self, pixels)

    def count_texts(self, prompt, images):
        seen["texts"].append(prompt)
        return text(self, prompt, images)

    monkeypatch.setattr(EditEncoders, "encode_sources", count_sources)
    monkeypatch.setattr(EditEncoders, "encode_edit", count_texts)
    return seen


def test_sources_and_their_texts_are_copied_from_an_earlier_cache(mixed, tmp_path, encoded):
    """Another name of a source, another order of the pairs, one new text, one new source."""
    config, earlier = mixed[SEES]
    data = write_mixed(tmp_path / "data")
    (data / "source2.png").rename(data / "renamed.png")
    (data / "new.png").write_bytes(image_bytes(77, SIZES[0]))
    rows = change_rows(data, lambda number, row: None)
    rows[2]["source"] = ["renamed.png", "source3.png"]
    rows[0]["source"] = ["new.png"]
    rows[3]["prompt"] = "another"
    lines = [rows[k] for k in (2, 1, 0, 3)]
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    fresh = config_of(config.model.path, data, tmp_path / "fresh")
    expected = prepare(fresh, progress=False)
    encoded |= {"sources": 0, "texts": []}
    reusing = config_of(
        config.model.path, data, tmp_path / "cache", reuse=str(config.prepare.cache_dir)
    )
    cache = prepare(reusing, progress=False)
    assert encoded == {"sources": 1, "texts": ["prompt 0", "another"]}
    for row in range(4):
        found, made = cache.read([row], 0).conditions, expected.read([row], 0).conditions
        assert found.keys() == made.keys()
        for name, values in found.items():
            torch.testing.assert_close(values, made[name], atol=1e-5, rtol=1e-5)
    kept = cache.read([0], 0).conditions["source_latents_2"]
    assert torch.equal(kept, earlier.read([2], 0).conditions["source_latents_2"])


def test_texts_of_parts_with_other_lengths_are_read_together(tmp_path):
    """Parts whose texts see one image, or two, are padded otherwise."""
    written = {}
    for name, own, length in (("one", 3, 8), ("two", 9, 12), ("full", 8, 8)):
        states = torch.zeros(1, length, 2)
        states[:, :own] = torch.randn(1, own, 2)
        mask = torch.arange(length)[None] < own
        written[name] = states[0, :own]
        tensors = without_padding({"embeds": states, "mask": mask})
        save_file(tensors, tmp_path / f"{name}.safetensors")
    rows = TextRows(TensorFiles(tmp_path))
    found = rows.read([(f"{name}.safetensors", 0) for name in written])
    assert found["embeds"].shape == (3, 12, 2)
    assert found["mask"].sum(dim=1).tolist() == [3, 9, 8]
    for row, own in enumerate(written.values()):
        assert torch.equal(found["embeds"][row, : len(own)], own)
        assert not found["embeds"][row, len(own) :].any()
        assert found["mask"][row, : len(own)].all()
    alone = rows.read([("one.safetensors", 0)])
    assert alone["embeds"].shape == (1, 8, 2)


def image_cell(number):
    return image_bytes(2000 + number, (64, 48))


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CELLS = {
    "bytes": (pa.binary(), [image_cell(0), image_cell(1), image_cell(0)]),
    "structs": (STRUCT, [{"bytes": image_cell(k), "path": "x.png"} for k in (0, 1, 0)]),
    "lists": (
        pa.list_(STRUCT),
        [
            [{"bytes": image_cell(0), "path": None}, {"bytes": image_cell(1), "path": None}],
            [{"bytes": None, "path": "named.png"}],
            [{"bytes": image_cell(1), "path": None}, {"bytes": image_cell(0), "path": None}],
        ],
    ),
}


def write_table(folder, kind, cells):
    """A table in Pick-a-Pic's schema, two row groups."""
    folder.mkdir(exist_ok=True)
    (folder / "named.png").write_bytes(image_cell(2))
    rows = len(cells)
    columns = {
        "caption": pa.array([f"prompt {k}" for k in range(rows)]),
        "jpg_0": pa.array([image_bytes(2 * k) for k in range(rows)]),
        "jpg_1": pa.array([image_bytes(2 * k + 1) for k in range(rows)]),
        "label_0": pa.array([1.0] * rows),
        "label_1": pa.array([0.0] * rows),
        "source": pa.array(cells, kind),
    }
    pq.write_table(pa.table(columns), folder / "train-0.parquet", row_group_size=2)
    return DataConfig(source="pickapic", path=str(folder), max_bad=1.0)


@pytest.mark.parametrize("form", [*CELLS])
def test_tables_hold_source_images_as_bytes(tmp_path, form):
    source = open_source(write_table(tmp_path, *CELLS[form]))
    assert source.edits()
    images = source.source_images()
    numbers = [[0, 1], [2], [1, 0]] if form == "lists" else [[0], [1], [0]]
    assert [[*images.sets[k]] for k in images.numbers.tolist()] == numbers
    assert images.most == max(map(len, numbers))
    assert [images.read(k) for k in range(len(images.names))] == [
        image_cell(k) for k in range(len(images.names))
    ]
    found = [[read() for read in pair.source_images] for pair in source]
    assert found == [[image_cell(k) for k in each] for each in numbers]


def test_a_table_without_a_source_in_a_row_or_of_none_at_all(tmp_path):
    lacking = write_table(tmp_path / "a", pa.binary(), [image_cell(0), None, image_cell(1)])
    with pytest.raises(DataError, match=r"1 of 3 pairs have no source image, the first is pair 1"):
        open_source(lacking).source_images()
    away = [{"bytes": image_cell(0), "path": None}, {"bytes": None, "path": "gone.png"}]
    source = open_source(write_table(tmp_path / "b", STRUCT, away))
    source.source_images()
    assert [row.reason for row in source.bad.kept] == [
        f"source image unreadable: [Errno 2] No such file or directory: "
        f"'{tmp_path / 'b' / 'gone.png'}'"
    ]
    texts = open_source(write_table(tmp_path / "c", pa.string(), ["a site", "a site"]))
    assert not texts.edits()
    assert texts.source_images() is None
    assert [pair.source_images for pair in texts] == [(), ()]


def write_parquet(folder, rows):
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")


def write_jsonl(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tar(folder, rows):
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for i, row in enumerate(rows):
            names = {"winner": row["winner"], "loser": row["loser"], "source": row["source"][0]}
            names["source_2"] = row["source"][1]
            content = {f"{name}.png": (folder / file).read_bytes() for name, file in names.items()}
            for name, data in {"txt": b"a prompt", **content}.items():
                member = tarfile.TarInfo(f"{i}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("write", [write_parquet, write_jsonl, write_tar])
def test_other_listings_name_several_sources(tmp_path, write):
    write_folder(tmp_path, 3, sources=SIZES, together=2)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "pairs.jsonl").unlink()
    write(tmp_path, rows)
    source = open_source(DataConfig(source="folder", path=str(tmp_path)))
    expected = [[(tmp_path / name).read_bytes() for name in row["source"]] for row in rows]
    assert [[read() for read in pair.source_images] for pair in source] == expected
    images = source.source_images()
    assert images.sets == [(0, 1), (2, 3)]
    assert images.numbers.tolist() == [0, 1, 0]
    assert [images.read(k) for k in (0, 1)] == expected[0]


def test_several_data_sets_and_relabeled_copies_keep_several_sources(tmp_path):
    for name in "ab":
        write_folder(tmp_path / name, 2, sources=SIZES, together=2)
    each = [{"source": "folder", "path": str(tmp_path / name)} for name in "ab"]
    images = open_source(DataConfig(sources=each)).source_images()
    assert images.sets == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert images.numbers.tolist() == [0, 1, 2, 3]
    assert images.read(5) == (tmp_path / "b" / "source1.png").read_bytes()
    (tmp_path / "out").mkdir()
    shards, pairs = Shards(tmp_path / "out"), open_source(DataConfig(**each[0]))
    with shards.closing():
        assert [shards.add(pair, Decision()) for pair in pairs] == [None, None]
    copied = open_source(DataConfig(source="folder", path=str(tmp_path / "out")))
    found, expected = (
        [[read() for read in pair.source_images] for pair in one] for one in (copied, pairs)
    )
    assert found == expected


def test_prompts_of_edits_come_with_several_sources(mixed, tmp_path):
    config, _ = mixed["flux2"]
    raw = config.model_dump(mode="json")
    listing = f"{config.data.path}/pairs.jsonl"
    raw["evaluate"] = {"prompts_file": listing, "seeds_per_prompt": 1, "num_inference_steps": 1}
    config = parse_config(raw)
    samples = plan_samples(config)
    assert [len(sample.sources) for sample in samples] == [1, 2, 2, 2]
    sampler = ImageSampler(config, progress=False)
    prints = {sampler.fingerprint([sample]) for sample in (samples[1], samples[3])}
    assert len(prints) == 2, "the same images in another order"
    (image,) = sampler.images(sampler.pipeline, samples[1:2])
    assert image.size == (64, 64)
