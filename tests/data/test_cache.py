"""Reading the cache: random access, flips, limits, and every refusal."""

import errno
import json
import pickle
import shutil

import pytest
import torch

import fastpo.data.cache.pairs as module
from fastpo.config import parse_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.fingerprint import cache_fingerprint
from fastpo.data.cache.flips import is_flipped
from fastpo.data.loader import make_loader
from fastpo.data.prepare import prepare
from fastpo.data.sampler import PairSampler
from fastpo.data.sources import source_digest
from fastpo.errors import CacheError
from fastpo.models.folder import ModelFolder
from fastpo.system.json_text import seal, unseal
from fastpo.testing import tiny_sdxl_folder, write_folder
from fastpo.types import pair_key

pytestmark = pytest.mark.usefixtures("one_thread")


def raw_config(pipeline, data, cache):
    return {
        "model": {"path": str(pipeline)},
        "data": {"source": "folder", "path": str(data)},
        "prepare": {"cache_dir": str(cache), "resolution": 32, "shard_size": 4},
        "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
    }


@pytest.fixture(scope="module")
def made(tiny_pipelines, tmp_path_factory):
    """Ten pairs of two shapes in three shards, for both families: `{family: raw config}`."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("cache")
    data = write_folder(root / "data", 10, sizes=[(48, 48), (48, 48), (80, 48)])
    raws = {f: raw_config(p, data, root / f) for f, p in tiny_pipelines.items()}
    for raw in raws.values():
        prepare(parse_config(raw), progress=False)
    return raws


@pytest.fixture
def open_with(made):
    """Opens the cache with options changed: `open_with("sdxl", data={"limit": 3})`."""

    def open_cache(family="sdxl", verify=False, **sections):
        raw = {name: dict(section) for name, section in made[family].items()}
        for name, changes in sections.items():
            raw.setdefault(name, {}).update(changes)
        return PairCache.open(parse_config(raw), verify=verify)

    return open_cache


@pytest.fixture
def own_copy(made, tmp_path):
    """A copy of the SDXL cache to damage: its folder and a configuration for it."""
    folder = tmp_path / "cache"
    shutil.copytree(made["sdxl"]["prepare"]["cache_dir"], folder)
    raw = made["sdxl"] | {"prepare": made["sdxl"]["prepare"] | {"cache_dir": str(folder)}}
    return folder, parse_config(raw)


PARTS = {"sd15": ["text_encoder", "tokenizer"], "sdxl": ["text_encoder", "tokenizer"]}
PARTS["sdxl"] += ["text_encoder_2", "tokenizer_2"]


@pytest.mark.parametrize("family", PARTS)
def test_a_cache_on_disk_keeps_its_identity(made, family):
    """Field by field as release 0.1.0 wrote it, so that no cache has to be prepared again."""
    config = parse_config(made[family])
    model = ModelFolder.resolve(config.model)
    identity = cache_fingerprint(config, model)
    assert identity.fields == {
        "model family": family,
        "VAE": model.digest("vae").sha256,
        **{name: model.digest(name).sha256 for name in PARTS[family]},
        "data.source": "folder",
        "data.path": config.data.path,
        "data.split": "train",
        "data files": source_digest(config.data),
        "prepare.resolution": "32",
        "prepare.buckets": "true",
        "image geometry": str(identity.geometry),
        "prepare.vae_precision": "fp32",
        "prepare.text_precision": "fp32",
        "prepare.store_precision": "fp16",
    }


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_batch_has_the_promised_shapes_and_dtypes(open_with, family):
    cache = open_with(family)
    batch = cache.read([4, 0, 3], visit=2)
    assert batch.index.tolist() == [4, 0, 3]
    assert batch.visit.tolist() == [2, 2, 2]
    assert batch.pair_key.tolist() == [pair_key(f"p{i}") for i in (4, 0, 3)]
    assert batch.latent_mean.shape == batch.latent_logvar.shape == (6, 4, 8, 8)
    given = batch.conditions
    assert batch.latent_mean.dtype == given["prompt_embeds"].dtype == torch.float16
    assert given["prompt_embeds"].shape == (3, 77, {"sd15": 16, "sdxl": 40}[family])
    if family == "sd15":
        assert given.keys() == {"prompt_embeds"}
        return
    assert given.keys() == {"prompt_embeds", "pooled", "add_time_ids"}
    assert given["pooled"].shape == (3, 20)
    assert given["add_time_ids"].dtype == torch.float32
    assert given["add_time_ids"].tolist() == [[48, 48, 0, 0, 32, 32]] * 3


def test_attributes_describe_the_pairs(open_with):
    cache = open_with()
    assert len(cache) == 10
    assert cache.pair_ids == [f"p{i}" for i in range(10)]
    assert cache.pair_keys.tolist() == [pair_key(name) for name in cache.pair_ids]
    assert cache.prompts == ["", "prompt 0", "prompt 1", "prompt 2"]
    assert [cache.prompts[i] for i in cache.prompt_index] == [f"prompt {i % 3}" for i in range(10)]
    shapes = [cache.latent_shapes[b] for b in cache.bucket]
    assert shapes == [(6, 10) if i % 3 == 2 else (8, 8) for i in range(10)]
    assert not cache.flipped.any()
    assert cache.report["pairs"] == 10
    assert cache.quarantined == 0


def test_any_order_gives_the_same_pairs(open_with):
    cache = open_with()
    one = {i: cache.read([i], 0) for i in range(10)}
    batch = cache.read([9, 1, 3, 1], 0)
    for row, i in enumerate([9, 1, 3, 1]):
        assert torch.equal(batch.latent_mean[[row, row + 4]], one[i].latent_mean)
        assert torch.equal(batch.latent_logvar[[row, row + 4]], one[i].latent_logvar)
        for name, rows in batch.conditions.items():
            assert torch.equal(rows[row], one[i].conditions[name][0])


def test_flips_exchange_the_sides_and_nothing_else(open_with):
    plain, flipped = open_with(), open_with(data={"flip_rate": 0.5, "flip_seed": 1})
    assert flipped.flipped.tolist() == [
        is_flipped(name, rate=0.5, seed=1) for name in plain.pair_ids
    ]
    assert 0 < flipped.flipped.sum() < 10
    assert flipped.fingerprint == plain.fingerprint
    for i in range(10):
        a, b = plain.read([i], 0), flipped.read([i], 0)
        swap = [1, 0] if flipped.flipped[i] else [0, 1]
        assert torch.equal(b.latent_mean, a.latent_mean[swap])
        assert torch.equal(b.latent_logvar, a.latent_logvar[swap])
        for name, rows in a.conditions.items():
            assert torch.equal(b.conditions[name], rows)
        assert torch.equal(b.flipped, flipped.flipped[i : i + 1])
        assert not torch.equal(a.latent_mean[0], a.latent_mean[1])


def test_flips_in_a_batch_equal_flips_one_by_one(open_with):
    cache = open_with(data={"flip_rate": 0.5, "flip_seed": 1})
    square = [i for i in range(10) if i % 3 != 2]
    batch = cache.read(square, 0)
    single = [cache.read([i], 0).latent_mean for i in square]
    assert torch.equal(batch.latent_mean, torch.stack(single, dim=1).flatten(0, 1))


def test_flips_are_the_same_in_every_epoch_and_reading_changes_nothing(open_with):
    cache = open_with(data={"flip_rate": 0.9})
    first = cache.read([0, 1], 0).latent_mean
    assert torch.equal(first, cache.read([0, 1], 1).latent_mean)
    first.zero_()
    assert cache.read([0, 1], 2).latent_mean.any()


def test_empty_prompt_is_number_zero(open_with):
    for family in ("sd15", "sdxl"):
        cache = open_with(family)
        empty, other = cache.empty_prompt(), cache.read([0], 0).conditions
        assert empty.keys() == other.keys() - {"add_time_ids"}
        assert empty["prompt_embeds"].shape[:2] == (1, 77)
        assert not torch.equal(empty["prompt_embeds"], other["prompt_embeds"])


def test_limit_takes_the_first_pairs(open_with):
    cache = open_with(data={"limit": 3})
    assert cache.pair_ids == ["p0", "p1", "p2"]
    assert len(cache.bucket) == len(cache.flipped) == len(cache.pair_keys) == 3


def test_a_smaller_limit_leaves_the_mask_of_flips_whole(open_with):
    """Rate and seed name the mask, so runs of every limit share it."""
    whole = open_with(data={"flip_rate": 0.4}).write_flip_mask().read_text()
    path = open_with(data={"flip_rate": 0.4, "limit": 3}).write_flip_mask()
    assert path.read_text() == whole


def test_a_read_only_cache_has_its_mask_of_flips_elsewhere(open_with, tmp_path, monkeypatch):
    cache = open_with(data={"flip_rate": 0.4})
    expected = cache.write_flip_mask()
    problem, write = errno.EROFS, module.write_flip_mask

    def refused(folder, *arguments, **options):
        if folder == cache.folder:
            raise OSError(problem, "no", str(folder))
        return write(folder, *arguments, **options)

    monkeypatch.setattr(module, "write_flip_mask", refused)
    path = cache.write_flip_mask(otherwise=tmp_path)
    assert path == tmp_path / expected.name
    assert path.read_text() == expected.read_text()
    with pytest.raises(OSError, match="no"):
        cache.write_flip_mask()
    problem = errno.ENOSPC
    with pytest.raises(OSError, match="no"):
        cache.write_flip_mask(otherwise=tmp_path)


def test_mixed_or_no_pairs_are_refused(open_with):
    cache = open_with()
    with pytest.raises(ValueError, match=r"one bucket, got buckets \[0, 1\]"):
        cache.read([0, 2], 0)
    with pytest.raises(ValueError, match=r"one bucket, got buckets \[\]"):
        cache.read([], 0)


def test_a_pickled_cache_reads_the_same(open_with):
    cache = open_with()
    before = cache.read([0], 0)
    again = pickle.loads(pickle.dumps(cache)).read([0], 0)
    assert torch.equal(before.latent_mean, again.latent_mean)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_each_pair_once_an_epoch(open_with, workers):
    cache = open_with()
    sampler = PairSampler(cache.bucket, 2, seed=0)
    steps = 2 * sampler.micro_batches_per_epoch
    loader = make_loader(cache, sampler, total_steps=steps, workers=workers)
    visits = [
        visit
        for batch in loader
        for visit in zip(batch.index.tolist(), batch.visit.tolist(), strict=True)
    ]
    assert sorted(visits) == [(i, epoch) for i in range(10) for epoch in (0, 1)]


def test_open_without_verify_loads_no_model_and_hashes_nothing(open_with, monkeypatch):
    from fastpo.models import folder

    def fail(*args):
        raise AssertionError("hashed")

    monkeypatch.setattr(folder, "digest_files", fail)
    open_with()


def test_missing_cache(made, tmp_path):
    raw = made["sdxl"] | {"prepare": {"cache_dir": str(tmp_path / "none")}}
    with pytest.raises(CacheError, match=r"no prepared cache in .*none: run `fastpo prepare`"):
        PairCache.open(parse_config(raw))


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"prepare": {"resolution": 64}}, r"prepare\.resolution: .* gives '64', .* with '32'"),
        ({"prepare": {"buckets": False}}, r"prepare\.buckets: .* gives 'false'"),
        ({"prepare": {"vae_precision": "bf16"}}, r"prepare\.vae_precision: .* 'bf16'"),
        ({"prepare": {"text_precision": "bf16"}}, r"prepare\.text_precision: .* 'bf16'"),
        ({"prepare": {"store_precision": "fp32"}}, r"prepare\.store_precision: .* 'fp32'"),
        ({"data": {"path": "elsewhere"}}, r"data\.path: .* gives 'elsewhere'"),
        ({"data": {"split": "test"}}, r"data\.split: .* 'test', .* 'train'"),
        ({"data": {"source": "hpdv2"}}, r"data\.source: .* 'hpdv2', .* 'folder'"),
    ],
)
def test_other_settings_are_refused_by_name(open_with, sections, complaint):
    with pytest.raises(CacheError, match=complaint):
        open_with(**sections)


def test_settings_that_do_not_shape_the_content_are_accepted(open_with):
    open_with(
        prepare={"batch_size": 1, "workers": 0, "shard_size": 7},
        data={"flip_rate": 0.3, "flip_seed": 9},
        train={"max_steps": 99},
    )


def test_another_vae_is_refused_by_name(open_with, tmp_path):
    other = tiny_sdxl_folder(tmp_path / "other", seed=1)
    with pytest.raises(CacheError) as refusal:
        open_with(model={"vae": str(other)})
    assert "VAE" in str(refusal.value)
    assert "text_encoder" not in str(refusal.value)
    assert "prepare.cache_dir" in str(refusal.value)


def test_another_model_is_refused_by_each_part(open_with, made, tmp_path):
    other = tiny_sdxl_folder(tmp_path / "other", seed=1)
    with pytest.raises(CacheError, match=r"VAE: .*; text_encoder: .*; text_encoder_2: "):
        open_with(model={"path": str(other)})
    with pytest.raises(CacheError, match=r"model family: .* 'sd15', .* 'sdxl'"):
        open_with(model={"path": made["sd15"]["model"]["path"]})


def test_the_same_weights_elsewhere_are_accepted(open_with, made, tmp_path):
    shutil.copytree(made["sdxl"]["model"]["path"], tmp_path / "moved")
    assert len(open_with(model={"path": str(tmp_path / "moved")})) == 10


def test_changed_data_is_refused(made, tmp_path):
    data = write_folder(tmp_path / "data", 2)
    config = parse_config(raw_config(made["sdxl"]["model"]["path"], data, tmp_path / "cache"))
    prepare(config, progress=False)
    write_folder(data, 3)
    with pytest.raises(CacheError, match="data files: "):
        PairCache.open(config)
    shutil.rmtree(data)
    assert len(PairCache.open(config)) == 2, "the cache serves without the raw data"


def test_missing_and_truncated_files_are_named(own_copy):
    folder, config = own_copy
    shard = folder / "shard-00001" / "latents.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CacheError, match=rf"{shard} is damaged: {len(content) - 1} bytes"):
        PairCache.open(config)
    shard.unlink()
    with pytest.raises(CacheError, match=f"missing file: {shard}"):
        PairCache.open(config)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "identity": 3}'])
def test_a_damaged_manifest_is_an_error(own_copy, text):
    folder, config = own_copy
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        PairCache.open(config)


def test_another_layout_version_is_an_error(own_copy):
    folder, config = own_copy
    (folder / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(CacheError, match="layout version 99, this FastPO reads 2"):
        PairCache.open(config)


def test_an_unfinished_cache_is_refused(own_copy):
    folder, config = own_copy
    path = folder / "manifest.json"
    about = unseal(json.loads(path.read_text()))
    path.write_text(seal(about | {"complete": False}))
    with pytest.raises(CacheError, match=r"unfinished \(4 of 4 parts done\)"):
        PairCache.open(config)
