"""Faults of the machine are tried again and then stop the work; only bad content is left out."""

import errno
import os
from pathlib import Path

import pytest
import torch

from fastpo.data.cache import PairCache
from fastpo.data.cache.tensors import TensorFiles
from fastpo.data.prepare import encode, prepare
from fastpo.data.prepare import latents as module
from fastpo.data.prepare.verify_source import read_image
from fastpo.data.sources import files, open_source
from fastpo.errors import ConfigError, DataError
from fastpo.models.encoders import Encoders
from fastpo.system import retry
from fastpo.testing import write_folder

pytestmark = pytest.mark.usefixtures("one_thread")
PASSING = (
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.ESTALE,
    errno.ETIMEDOUT,
)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits asked for; nobody sleeps."""
    waited = []
    monkeypatch.setattr(retry, "_sleep", waited.append)
    return waited


@pytest.fixture(scope="module")
def pipeline(tiny_pipelines):
    return tiny_pipelines["sd15"]


@pytest.fixture
def config(config_for, tmp_path, pipeline, monkeypatch):
    write_folder(tmp_path / "data", 3, prompts=1)
    config = config_for("sd15", prepare={"workers": 0})
    encoders = Encoders.load(config)
    monkeypatch.setattr(Encoders, "load", lambda *_, **__: encoders)
    return config


def failing(monkeypatch, name, error, times):
    """Lets the first reads of a file fail; gives how often it was read."""
    original, seen = files.read_image_file, []

    def read(path):
        if Path(path).name == name:
            seen.append(path)
            if len(seen) <= times:
                raise error() if isinstance(error, type) else OSError(error, os.strerror(error))
        return original(path)

    monkeypatch.setattr(files, "read_image_file", read)
    return seen


def test_faults_that_pass_leave_no_trace(config, monkeypatch, waits):
    for error in (*PASSING, MemoryError):
        with monkeypatch.context() as patch:
            failing(patch, "loser1.png", error, times=2)
            pair = next(iter(open_source(config.data).pairs(1, 2)))
            assert read_image(pair.loser), error
    assert waits == list(retry.WAITS[:2]) * (len(PASSING) + 1)
    failing(monkeypatch, "loser1.png", errno.EIO, times=2)
    cache = prepare(config, progress=False)
    assert cache.pair_ids == ["p0", "p1", "p2"] and cache.left_out() is None


def test_a_fault_that_stays_stops_naming_the_pair_and_loses_nothing(config, monkeypatch, waits):
    with monkeypatch.context() as patch:
        seen = failing(patch, "winner2.png", errno.EIO, times=99)
        with pytest.raises(DataError, match=r"pair p2: .*Input/output error.* was not left out"):
            prepare(config, progress=False)
        assert len(seen) == len(retry.WAITS) + 1
        assert waits == list(retry.WAITS)
    assert len(prepare(config, progress=False)) == 3


def test_no_permission_is_no_reason_to_leave_a_pair_out(config, monkeypatch, waits):
    failing(monkeypatch, "winner2.png", errno.EACCES, times=99)
    with pytest.raises(DataError, match=r"pair p2: .*Permission denied"):
        prepare(config, progress=False)
    assert not waits, "it does not pass by itself"


def test_memory_that_runs_out_while_decoding_is_no_bad_image(config, monkeypatch):
    monkeypatch.setattr(module, "load_pair", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(DataError, match=r"pair p0: .*out of memory; lower prepare\.workers"):
        prepare(config, progress=False)


def test_memory_that_runs_out_while_encoding_says_what_to_lower(config, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "encode_images", fail)
        expected = (
            r"prepare\.batch_size: out of memory over 2 images of 32x32; lower it \(it is 2\)"
        )
        with pytest.raises(ConfigError, match=expected):
            prepare(config, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "encode_prompts", fail)
        with pytest.raises(ConfigError, match=r"over 2 prompts; lower it"):
            encode.write_prompts(config, Encoders.load(config), None, ["a", "b"])
    assert len(prepare(config, progress=False)) == 3


def test_a_row_of_the_cache_is_read_again_after_a_fault(config, monkeypatch, waits):
    cache = prepare(config, progress=False)
    expected, original, failed = cache.read([0], 0), os.preadv, []

    def preadv(*arguments):
        if len(failed) < 2:
            failed.append(arguments)
            raise OSError(errno.EIO, "Input/output error")
        return original(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    again = PairCache.open(config).read([0], 0)
    assert torch.equal(again.latent_mean, expected.latent_mean)
    assert waits == list(retry.WAITS[:2])
    monkeypatch.setattr(TensorFiles, "_file", lambda *_: os.open("/nowhere", 0))
    with pytest.raises(Exception, match="No such file"):
        PairCache.open(config).read([0], 0)
    assert waits == list(retry.WAITS[:2]), "a missing file is no fault that passes"


def test_left_out_pairs_are_counted_and_tried_again_when_asked(config, tmp_path, capsys):
    image = tmp_path / "data" / "loser1.png"
    whole = image.read_bytes()
    image.write_bytes(b"no image")
    cache = prepare(config, progress=False)
    assert cache.left_out() == (
        f"1 of 3 pairs left out: {cache.folder / 'quarantine.jsonl'}, first reason (p1): loser: "
        "UnidentifiedImageError: no JPEG, PNG, WEBP, GIF or BMP image"
    )
    image.write_bytes(whole)  # the cache holds nothing of it, so it is no other data set
    assert prepare(config, progress=False).pair_ids == ["p0", "p2"]
    part = cache.folder / "shard-00001" / "latents.safetensors"
    made = part.stat().st_mtime_ns
    again = prepare(config, progress=False, retry_quarantined=True)
    assert again.pair_ids == ["p0", "p1", "p2"] and again.left_out() is None
    assert part.stat().st_mtime_ns == made, "a part without such pairs stays"
    assert "1 pair(s) in quarantine, tried again" in capsys.readouterr().err


def test_touched_images_are_the_same_images(config, tmp_path):
    (tmp_path / "data" / "loser1.png").write_bytes(b"no image")
    first = prepare(config, progress=False)
    for path in (tmp_path / "data").iterdir():
        os.utime(path, ns=(5, 5))
    assert prepare(config, progress=False).fingerprint == first.fingerprint
