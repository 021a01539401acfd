"""Preparing that is ended anywhere goes on, and makes what it would have made at once."""

import pytest

from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.models.encoders import Encoders
from fastpo.testing import write_folder
from tests.faults.crash_points import FAULTS, end_everywhere


def content(folder):
    """Every file but the lock, which holds nothing, and the marker, whose id is the folder's."""
    hidden = (".claims", ".fastpo")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in hidden)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_is_finished_wherever_its_making_ended(
    config_for, tmp_path, monkeypatch, one_thread, fault
):
    write_folder(tmp_path / "data", 3, prompts=1)

    def cache(number):
        return tmp_path / f"cache-{number}"

    def config(number):
        return config_for(data={"flip_rate": 0.5}, prepare={"cache_dir": str(cache(number))})

    encoders = Encoders.load(config("whole"))
    monkeypatch.setattr(Encoders, "load", lambda *_, **__: encoders)
    prepare(config("whole"), progress=False)
    whole = content(cache("whole"))

    def check(number):
        prepare(config(number), progress=False)
        assert content(cache(number)) == whole
        PairCache.open(config(number), verify=True)

    def act(number):
        prepare(config(number), progress=False)

    steps = end_everywhere(act, check, cache, fault)
    assert steps > 20
