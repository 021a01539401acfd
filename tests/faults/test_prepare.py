"""Preparing that is ended anywhere goes on, and makes what it would have made at once."""

import pytest

from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.models.encoders import Encoders
from fastpo.testing import write_folder
from tests.faults.crash_points import end_everywhere


def content(folder):
    """Every file but the lock, which holds nothing, and the marker, whose id is the folder's."""
    hidden = (".claims", ".fastpo")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in hidden)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
def test_a_cache_is_finished_wherever_its_making_ended(
    config_for, tmp_path, monkeypatch, one_thread, power_cut
):
    write_folder(tmp_path / "data", 3, prompts=1)

    def config(number):
        return config_for(
            data={"flip_rate": 0.5}, prepare={"cache_dir": str(tmp_path / f"cache-{number}")}
        )

    encoders = Encoders.load(config("whole"))
    monkeypatch.setattr(Encoders, "load", lambda *_, **__: encoders)
    prepare(config("whole"), progress=False)
    whole = content(tmp_path / "cache-whole")

    def check(number):
        prepare(config(number), progress=False)
        assert content(tmp_path / f"cache-{number}") == whole
        PairCache.open(config(number), verify=True)

    steps = end_everywhere(
        lambda number: prepare(config(number), progress=False),
        check,
        power_cut=(lambda number: [tmp_path / f"cache-{number}"]) if power_cut else None,
    )
    assert steps > 20
