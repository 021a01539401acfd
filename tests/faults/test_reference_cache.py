"""Computing reference errors that is ended anywhere goes on, and ends with the same tables."""

import shutil

import pytest

import fastpo.reference_cache.compute as module
from fastpo.config import load_config
from fastpo.reference_cache import prepare_reference
from tests.faults.crash_points import FAULTS, end_everywhere


def content(folder):
    files = (path for path in (folder / "reference").rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name not in (".claims", ".fastpo", "unet.json")  # the memo holds times of change
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_tables_are_finished_wherever_their_making_ended(
    experiment, tiny_caches, tmp_path, monkeypatch, one_thread, fault
):
    path = experiment(family="sd15", reference="cached", name="reference")

    def cache(number):
        folder = tmp_path / f"cache-{number}"
        if not folder.exists():
            shutil.copytree(tiny_caches / "sd15", folder)
        return folder

    def config(number):
        return load_config(path, [f"prepare.cache_dir={cache(number)}"])

    monkeypatch.setattr(module, "BLOCK_PAIRS", 6)
    load, models = module.load_reference, []

    def load_once(*arguments):
        models.append(models[0] if models else load(*arguments))
        return models[0]

    monkeypatch.setattr(module, "load_reference", load_once)
    prepare_reference(config("whole"), 1, progress=False)
    whole = content(cache("whole"))
    assert len(whole) == 2

    def check(number):
        prepare_reference(config(number), 1, progress=False)
        assert content(cache(number)) == whole

    def act(number):
        prepare_reference(config(number), 1, progress=False)

    steps = end_everywhere(act, check, cache, fault)
    assert steps > 15
