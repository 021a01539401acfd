"""A refused preparation, given again once what was wrong is right, does what it does at first."""

import shutil

import pytest

from fastpo.data.cache import PairCache
from fastpo.data.cache.manifest import load_manifest
from fastpo.data.prepare import prepare
from fastpo.data.prepare.encode import ShardBuilder
from fastpo.errors import CacheError, ConfigError, DataError, ModelError, TooManyBadRowsError
from fastpo.models.encoders import Encoders
from fastpo.system.locks import FolderLocks
from fastpo.testing import image_bytes, write_folder
from fastpo.testing.edits import small_sources
from fastpo.testing.flow import tiny_flux_kontext_folder
from tests.data.test_edits import SOURCES, config_of
from tests.data.test_prepare import content
from tests.forked import FORK

pytestmark = pytest.mark.usefixtures("one_thread")


def refuse(*_, **__):
    raise ConfigError("refused")


def test_a_refusal_before_anything_is_encoded_locks_no_folder(
    config_for, tiny_pipelines, tmp_path, monkeypatch
):
    write_folder(tmp_path / "data", 2)
    model = shutil.copytree(tiny_pipelines["sdxl"], tmp_path / "model")
    config = config_for(model={"path": str(model)})
    weights = model / "text_encoder" / "model.safetensors"
    weights.rename(tmp_path / "kept")
    with pytest.raises(ModelError, match="text_encoder"):
        prepare(config, progress=False)
    shutil.move(tmp_path / "kept", weights)
    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "load", refuse)
        for options in ({"prompt_chunks": 2}, {"vae_precision": "bf16"}):
            with pytest.raises(ConfigError, match="refused"):
                prepare(config_for(prepare=options), progress=False)
            with pytest.raises(CacheError, match=r"is unfinished \(0 of 3 parts done\)"):
                PairCache.open(config_for(prepare={"clip_skip": 1}))
        write_folder(tmp_path / "data", 3)
        with pytest.raises(ConfigError, match="refused"):
            prepare(config, progress=False)
    write_folder(tmp_path / "data", 2)
    prepare(config, progress=False)
    fresh = {"cache_dir": str(tmp_path / "whole")}
    prepare(config_for(model={"path": str(model)}, prepare=fresh), progress=False)
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_what_is_encoded_is_protected(config_for, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "encode_images", refuse)
        with pytest.raises(ConfigError, match="refused"):
            prepare(config_for(), progress=False)
    assert (tmp_path / "cache" / "text-00000").is_dir()
    with pytest.raises(CacheError, match=r"prepare\.prompt_chunks"):
        prepare(config_for(prepare={"prompt_chunks": 2}), progress=False)


def work_by_the_plan(folder, pipe):
    with FolderLocks(folder) as locks:
        with locks.manifest():
            pipe.send(locks.join())
        pipe.recv()


def test_a_plan_that_another_process_works_by_is_protected(config_for, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", 2)
    monkeypatch.setattr(Encoders, "load", refuse)
    with pytest.raises(ConfigError, match="refused"):
        prepare(config_for(), progress=False)
    plan = load_manifest(tmp_path / "cache")
    here, there = FORK.Pipe()
    worker = FORK.Process(target=work_by_the_plan, args=(tmp_path / "cache", there))
    worker.start()
    there.close()
    try:
        assert here.recv(), "it is the first"
        with pytest.raises(CacheError, match=r"prepare\.prompt_chunks"):
            prepare(config_for(prepare={"prompt_chunks": 2}), progress=False)
        assert load_manifest(tmp_path / "cache") == plan
        with pytest.raises(ConfigError, match="refused"):
            prepare(config_for(), progress=False)
    finally:
        here.send(None)
        worker.join()


@pytest.mark.parametrize("options", [{}, {"retry_quarantined": True}])
def test_losers_of_another_aspect_are_taken_once_they_are_repaired(config_for, tmp_path, options):
    data = write_folder(tmp_path / "data", 4)
    whole = {path.name: path.read_bytes() for path in data.glob("loser*")}
    for name in whole:
        (data / name).write_bytes(image_bytes(3, (96, 48)))
    with pytest.raises(DataError, match="none of 4 pairs is usable"):
        prepare(config_for(), progress=False)
    for name, image in whole.items():
        (data / name).write_bytes(image)
    prepare(config_for(), progress=False, **options)
    prepare(config_for(prepare={"cache_dir": str(tmp_path / "whole")}), progress=False)
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, {"retry_quarantined": True}])
def test_a_source_that_was_refused_is_taken_once_it_is_repaired(tmp_path, options):
    data = write_folder(tmp_path / "data", 4, sizes=((64, 64),), sources=SOURCES[:2])
    with small_sources():
        model = tiny_flux_kontext_folder(tmp_path / "model")
        whole = (data / "source1.png").read_bytes()
        (data / "source1.png").write_bytes(b"no image")
        config = config_of(model, data, tmp_path / "cache", data={"max_bad": 0}, shard_size=2)
        with pytest.raises(TooManyBadRowsError, match="source: Unidentified"):
            prepare(config, progress=False)
        (data / "source1.png").write_bytes(whole)
        prepare(config, progress=False, **options)
        prepare(config_of(model, data, tmp_path / "whole", shard_size=2), progress=False)
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_a_source_replaced_before_any_pair_is_encoded_is_told(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", 4, sizes=((64, 64),), sources=SOURCES[:2])
    whole = (data / "source1.png").read_bytes()
    with small_sources():
        model = tiny_flux_kontext_folder(tmp_path / "model")
        config = config_of(model, data, tmp_path / "cache")
        with monkeypatch.context() as patch:
            patch.setattr(ShardBuilder, "add", refuse)
            with pytest.raises(ConfigError, match="refused"):
                prepare(config, progress=False)
        (data / "source1.png").write_bytes(image_bytes(9, (64, 64)))
        with pytest.raises(CacheError, match=r"1 source image\(s\) of .* others .*: source1\.png"):
            prepare(config, progress=False)
        (data / "source1.png").write_bytes(whole)
        prepare(config, progress=False)
        prepare(config_of(model, data, tmp_path / "whole"), progress=False)
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_of_data_that_show_no_change_the_refusal_says_how_to_go_on(
    config_for, tmp_path, monkeypatch
):
    monkeypatch.setattr("fastpo.data.prepare.latents.source_stamps", lambda _: None)
    data = write_folder(tmp_path / "data", 4)
    whole = {path.name: path.read_bytes() for path in data.glob("loser*")}
    for name in whole:
        (data / name).write_bytes(image_bytes(3, (96, 48)))
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of 4 pairs is usable.*--retry-quarantined"):
            prepare(config_for(), progress=False)
        for name, image in whole.items():
            (data / name).write_bytes(image)
    prepare(config_for(), progress=False, retry_quarantined=True)
