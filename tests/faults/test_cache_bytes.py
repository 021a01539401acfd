"""Wrong bytes in a cache: no file may change without being refused by name when it is read."""

import json
import shutil

import numpy as np
import pytest
import torch

from fastpo.config import parse_config
from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.errors import CacheError
from fastpo.models.folder import ModelFolder
from fastpo.noise import setup_noise
from fastpo.reference_cache import prepare_reference, reference_identity
from fastpo.reference_cache.store import open_reference_errors, write_part
from fastpo.system.locks import LOCK_FILE
from fastpo.system.ownership import MARKER
from fastpo.testing import write_folder

BESIDE = ("index.parquet", "prompts.parquet", "record.json")
"""Of a part; they are read when parts are merged, not in training."""


@pytest.fixture(scope="module")
def made(tiny_pipelines, tmp_path_factory):
    """Five pairs in two shards, one of them left out, with flipped labels and reference errors."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("made")
    data = write_folder(root / "data", 5, sizes=[(48, 48), (80, 48)])
    (data / "loser4.png").write_bytes(b"no image")
    raw = {
        "model": {"path": str(tiny_pipelines["sd15"])},
        "data": {"source": "folder", "path": str(data), "flip_rate": 0.5},
        "prepare": {"cache_dir": str(root / "cache"), "resolution": 32, "shard_size": 3},
        "train": {
            "output_dir": "unused",
            "objective": {"name": "dpo"},
            "max_steps": 1,
            "precision": "fp32",
            "reference": "cached",
        },
    }
    config = parse_config(raw)
    model = ModelFolder.resolve(config.model)
    cache = prepare(config, progress=False, model=model)
    prepare_reference(config, 1, progress=False, model=model)
    noise = setup_noise(config, model, torch.device("cpu"))
    return raw, model, reference_identity(config, model, cache, noise)


@pytest.fixture
def own(made, tmp_path):
    """A copy to damage: `own(**data_options)` gives its configuration."""
    raw, *_ = made
    shutil.copytree(raw["prepare"]["cache_dir"], tmp_path / "cache")

    def config(**data):
        prepared = raw["prepare"] | {"cache_dir": str(tmp_path / "cache")}
        return parse_config(raw | {"prepare": prepared, "data": raw["data"] | data})

    return config


def read_all(config, model, identity):
    """Everything that training reads of the caches."""
    cache = PairCache.open(config, model=model)
    batches = [cache.read([i], 0) for i in range(len(cache))]
    errors = open_reference_errors(config.prepare.cache_dir, identity, command="fastpo prepare")
    tensors = [errors.lookup(batch) for batch in batches]
    for batch in batches:
        tensors += [batch.latent_mean, batch.latent_logvar, *batch.conditions.values()]
    return [*tensors, *cache.empty_prompt().values()]


def files_of(config):
    """The cache's files; not its locks, nor the markers that say whose folders these are."""
    found = sorted(p for p in config.prepare.cache_dir.rglob("*") if p.is_file())
    return [path for path in found if path.name not in (LOCK_FILE, MARKER)]


def damaged(content):
    """The content with one bit flipped at several places, and cut off."""
    places = sorted({0, 9, len(content) // 3, len(content) // 2, len(content) - 1})
    for place in places:
        wrong = bytearray(content)
        wrong[place] ^= 1 << (place % 8)
        yield bytes(wrong)
    for length in (0, len(content) // 2, len(content) - 1):
        yield content[:length]


def test_everything_that_training_reads_is_refused_when_it_is_damaged(own, made):
    _, model, identity = made
    config = own()
    whole = read_all(config, model, identity)
    seen = 0
    for path in files_of(config):
        if path.name in (*BESIDE, "unet.json") or path.suffix == ".csv":
            continue
        content = path.read_bytes()
        for wrong in damaged(content):
            path.write_bytes(wrong)
            with pytest.raises(CacheError) as refusal:
                read_all(config, model, identity)
            assert str(path) in str(refusal.value), (path, refusal.value)
            assert "\n" not in str(refusal.value)
            seen += 1
        path.write_bytes(content)
    assert seen >= 80
    assert all(map(torch.equal, read_all(config, model, identity), whole))


def test_always_reads_every_file_at_the_start(own, made):
    _, model, _ = made
    config = own(verify="always")
    PairCache.open(config, model=model)
    for path in files_of(config):
        if "reference" in str(path.relative_to(config.prepare.cache_dir)) or path.suffix == ".csv":
            continue
        content = path.read_bytes()
        for wrong in damaged(content):
            path.write_bytes(wrong)
            with pytest.raises(CacheError) as refusal:
                PairCache.open(config, model=model)
            assert str(path) in str(refusal.value)
        path.write_bytes(content)


def test_never_looks_at_sizes_alone(own, made):
    _, model, identity = made
    config = own(verify="never")
    shard = config.prepare.cache_dir / "shard-00000" / "latents.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    read_all(config, model, identity)
    shard.write_bytes(content[:-1])
    with pytest.raises(CacheError, match=f"{shard} is damaged"):
        PairCache.open(config, model=model)


def test_a_row_is_checked_once_or_always(own, made):
    _, model, _ = made
    whole = own()
    for verify, refused in (("first", False), ("always", True)):
        config = config_with(whole, verify)
        cache = PairCache.open(config, model=model)
        cache.read([0], 0)
        shard = config.prepare.cache_dir / "shard-00000" / "latents.safetensors"
        content = shard.read_bytes()
        wrong = bytearray(content)
        for place in range(len(wrong) // 2, len(wrong)):  # whichever row it is
            wrong[place] ^= 1
        with shard.open("r+b") as file:
            file.write(wrong)
        if refused:
            with pytest.raises(CacheError, match="XXH3"):
                [cache.read([i], 0) for i in range(3)]
        else:
            cache.read([0], 1)
        shard.write_bytes(content)


def config_with(config, verify):
    return config.model_copy(update={"data": config.data.model_copy(update={"verify": verify})})


def as_before(folder):
    """Takes away what caches did not have before this version."""
    for path in [*folder.rglob("rows.json")]:
        path.unlink()
    for path in folder.rglob("*.json"):
        about = json.loads(path.read_text())
        for key in ("checksum", "beside"):
            about.pop(key, None)
        files = [*about.get("files", {}).values(), *(v["file"] for v in about.get("visits", ()))]
        for record in files:
            del record["xxh3"]
        if path.name == "record.json":
            del about["files"]["rows.json"]
        path.write_text(json.dumps(about))


def test_a_cache_of_before_is_read_and_its_shards_are_checked_whole(own, made):
    _, model, identity = made
    config = own()
    whole = read_all(config, model, identity)
    fingerprint = PairCache.open(config, model=model).fingerprint
    as_before(config.prepare.cache_dir)
    assert PairCache.open(config, model=model).fingerprint == fingerprint
    assert all(map(torch.equal, read_all(config, model, identity), whole))
    for path in files_of(config):
        if path.suffix in (".safetensors", ".arrow", ".npy"):
            content = path.read_bytes()
            for wrong in damaged(content):
                path.write_bytes(wrong)
                with pytest.raises(CacheError) as refusal:
                    read_all(config, model, identity)
                assert str(path) in str(refusal.value)
            path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "shard-00001/latents.safetensors",
        "shard-00000/index.parquet",
        "shard-00000/rows.json",
        "text-00000/text.safetensors",
        "text-00000/record.json",
        "index.arrow",
        "quarantine.jsonl",
    ],
)
@pytest.mark.parametrize("damage", ["bit", "lost"])
def test_prepare_makes_what_is_damaged_again_and_nothing_else(own, made, name, damage, capsys):
    _, model, _ = made
    config = own()
    files = {path: path.read_bytes() for path in files_of(config)}
    path = config.prepare.cache_dir / name
    part = path.parent if "/" in name else None
    times = {p: p.stat().st_mtime_ns for p in files if p.suffix == ".safetensors"}
    if damage == "lost":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        config = config_with(config, "always")
    prepare(config, progress=False, model=model)
    assert "made again: " in (told := capsys.readouterr().err) and str(path) in told
    again = {p: p.read_bytes() for p in files_of(config)}
    assert again == files
    remade = {p for p in times if p.stat().st_mtime_ns != times[p]}
    assert all(p.parent == part for p in remade)
    assert bool(remade) == (part is not None)


def test_a_damaged_table_of_reference_errors_is_computed_again(own, made, capsys):
    _, model, identity = made
    config = own()
    (table,) = config.prepare.cache_dir.rglob("visit-*.npy")
    content = table.read_bytes()
    wrong = bytearray(content)
    wrong[-3] ^= 4
    table.write_bytes(wrong)
    with pytest.raises(CacheError, match=r"visit-.* is damaged: XXH3 .*computes it again"):
        open_reference_errors(config.prepare.cache_dir, identity, command="fastpo prepare")
    prepare_reference(config, 1, progress=False, model=model)
    assert "computed again" in capsys.readouterr().err
    np.testing.assert_allclose(np.load(table), np.frombuffer(content[-32:], "f4").reshape(4, 2))


def test_a_damaged_block_of_reference_errors_is_refused(own, made):
    _, model, _ = made
    config = own()
    (folder,) = (config.prepare.cache_dir / "reference").glob("*/")
    write_part(folder, 1, 0, np.array([0, 1]), np.ones((2, 2), np.float32))
    (block,) = folder.glob("part-*")
    content = block.read_bytes()
    for wrong in damaged(content):
        block.write_bytes(wrong)
        with pytest.raises(CacheError, match=f"{block} is damaged"):
            prepare_reference(config, 2, progress=False, model=model)
    block.write_bytes(content)
    prepare_reference(config, 2, progress=False, model=model)


def test_a_damaged_memo_of_a_digest_is_not_believed(own, made):
    _, model, identity = made
    config = own()
    memo = config.prepare.cache_dir / "reference" / "unet.json"
    whole = memo.read_bytes()
    for wrong in damaged(whole):
        memo.write_bytes(wrong)
        fresh = ModelFolder(model.path)
        cache = PairCache.open(config, model=fresh)
        noise = setup_noise(config, fresh, torch.device("cpu"))
        assert reference_identity(config, fresh, cache, noise) == identity
        assert memo.read_bytes() == whole


def test_the_mask_of_flips_is_written_anew(own, made):
    _, model, _ = made
    config = own()
    (mask,) = config.prepare.cache_dir.glob("flips-*.csv")
    content = mask.read_bytes()
    mask.write_bytes(content[:-2])
    PairCache.open(config, model=model).write_flip_mask()
    assert mask.read_bytes() == content
