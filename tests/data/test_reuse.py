"""Data that grew: what an earlier cache holds is copied, whatever became of lines and names."""

import json
import shutil

import pytest
import torch

from fastpo.data.cache.manifest import load_manifest
from fastpo.data.prepare import prepare
from fastpo.errors import CacheError, ConfigError
from fastpo.models.encoders import Encoders
from fastpo.testing import image_bytes, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def encoded(monkeypatch):
    """Images and prompts that were encoded, one number a pair of images."""
    seen = {"images": 0, "prompts": []}
    images, prompts = Encoders.encode_images, Encoders.encode_prompts

    def count_images(self, pixels):
        seen["images"] += len(pixels)
        return images(self, pixels)

    def count_prompts(self, texts):
        seen["prompts"] += texts
        return prompts(self, texts)

    monkeypatch.setattr(Encoders, "encode_images", count_images)
    monkeypatch.setattr(Encoders, "encode_prompts", count_prompts)
    return seen


def lines_of(data):
    return [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]


def write_lines(data, lines):
    (data / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def earlier(config_for, tmp_path):
    write_folder(tmp_path / "data", 6, sizes=[(48, 48), (64, 32), (48, 48)])
    return prepare(config_for(prepare={"cache_dir": str(tmp_path / "earlier")}), progress=False)


def test_what_is_encoded_is_copied(config_for, tmp_path, earlier, encoded):
    """Lines added, removed, reordered, renamed, relabeled; one prompt changed, one image broken."""
    data = tmp_path / "data"
    p = lines_of(data)
    for name, seed in (("w9.png", 90), ("l9.png", 91)):
        (data / name).write_bytes(image_bytes(seed))
    new = {"id": "new", "prompt": "another", "winner": "w9.png", "loser": "l9.png"}
    turned = p[1] | {"winner": p[1]["loser"], "loser": p[1]["winner"]}
    write_lines(data, [p[5], new, turned, p[0] | {"id": "other name"}, p[4] | {"prompt": "edited"}])
    with pytest.raises(CacheError, match=r"data files: .* with prepare\.reuse=.*earlier, which"):
        prepare(config_for(prepare={"cache_dir": str(earlier.folder)}), progress=False)
    config = config_for(prepare={"reuse": str(earlier.folder)})
    cache = prepare(config, progress=False)
    assert encoded == {"images": 2, "prompts": ["another", "edited"]}
    assert cache.pair_ids == ["p5", "new", "p1", "other name", "p4"]
    fresh = prepare(config_for(prepare={"cache_dir": str(tmp_path / "fresh")}), progress=False)
    before = {"p5": 5, "p1": 1, "other name": 0, "p4": 4}
    for i, name in enumerate(cache.pair_ids):
        got, expected = cache.read([i], 0), fresh.read([i], 0)
        torch.testing.assert_close(got.latent_mean, expected.latent_mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.latent_logvar, expected.latent_logvar, atol=1e-5, rtol=1e-5)
        assert cache.latent_shapes[cache.bucket[i]] == fresh.latent_shapes[fresh.bucket[i]]
        for key, rows in expected.conditions.items():
            torch.testing.assert_close(got.conditions[key], rows, atol=1e-6, rtol=1e-5)
        if name in before:
            old = earlier.read([before[name]], 0).latent_mean
            assert torch.equal(got.latent_mean, old.flip(0) if name == "p1" else old)
    assert cache.prompts == fresh.prompts
    shutil.rmtree(earlier.folder)
    assert prepare(config, progress=False).fingerprint == cache.fingerprint, "it stands alone"


def test_nothing_changed_means_nothing_is_encoded(config_for, tmp_path, earlier, encoded):
    shutil.move(tmp_path / "data", tmp_path / "moved")
    config = config_for(
        data={"path": str(tmp_path / "moved")}, prepare={"reuse": str(earlier.folder)}
    )
    cache = prepare(config, progress=False)
    assert encoded == {"images": 0, "prompts": []}
    for i in range(6):
        assert torch.equal(cache.read([i], 0).latent_mean, earlier.read([i], 0).latent_mean)


def test_a_cache_without_digests_of_images_knows_its_pairs_by_content(
    config_for, tmp_path, earlier, encoded, monkeypatch
):
    """As it was made before digests of images were kept."""
    from fastpo.data.cache.parts import CachePart

    read = CachePart.record

    def without(part, folder):
        return read(part, folder).model_copy(update={"images": ""})

    monkeypatch.setattr(CachePart, "record", without)
    lines = lines_of(tmp_path / "data")
    write_lines(tmp_path / "data", [lines[3] | {"id": "renamed"}, lines[2], lines[0]])
    cache = prepare(config_for(prepare={"reuse": str(earlier.folder)}), progress=False)
    assert encoded["images"] == 2
    assert torch.equal(cache.read([1], 0).latent_mean, earlier.read([2], 0).latent_mean)


def test_only_caches_of_the_same_encoding_are_copied_from(config_for, tmp_path, earlier):
    reuse = {"reuse": str(earlier.folder)}
    with pytest.raises(CacheError, match=r"earlier was encoded otherwise: .*store_precision"):
        prepare(config_for(prepare=reuse | {"store_precision": "bf16"}), progress=False)
    assert load_manifest(tmp_path / "cache") is None
    with pytest.raises(CacheError, match=r"prepare\.reuse: no prepared cache in .*nowhere"):
        prepare(config_for(prepare={"reuse": str(tmp_path / "nowhere")}), progress=False)
    write_lines(tmp_path / "data", lines_of(tmp_path / "data")[:3])
    with pytest.raises(ConfigError, match=r"prepare\.reuse: .* is prepare\.cache_dir itself"):
        prepare(config_for(prepare={"reuse": str(tmp_path / "cache" / ".." / "cache")}))


def test_a_damaged_row_of_it_is_not_copied(config_for, tmp_path, earlier):
    path = earlier.folder / "shard-00001" / "latents.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"shard-00001/latents\.safetensors is damaged"):
        prepare(config_for(prepare={"reuse": str(earlier.folder)}), progress=False)
