"""A dropped caption trains what sampling conditions its unconditional branch on."""

import json
import shutil

import pytest
import torch
import yaml

from fastpo.config import dump_config, load_config
from fastpo.data.cache import PairCache
from fastpo.models.folder import ModelFolder
from fastpo.models.unet import UNetFamily
from fastpo.noise import dropped_conditions, setup_noise
from fastpo.reference_cache import prepare_reference
from fastpo.reference_cache.fingerprint import reference_identity
from fastpo.train import train
from fastpo.train.changes import completed, differing_keys, resumed_config


def dropped(config):
    model = ModelFolder.resolve(config.model)
    empty = PairCache.open(config, model=model).empty_prompt()
    return dropped_conditions(config, model, empty)


@pytest.fixture
def flagged(tiny_pipelines, tmp_path):
    """`flagged(value)`: an SDXL folder whose pipeline says so; None leaves the flag out."""

    def write(value):
        folder = shutil.copytree(tiny_pipelines["sdxl"], tmp_path / "model")
        path = folder / "model_index.json"
        index = json.loads(path.read_text())
        del index["force_zeros_for_empty_prompt"]
        if value is not None:
            index["force_zeros_for_empty_prompt"] = value
        path.write_text(json.dumps(index))
        return folder

    return write


@pytest.mark.parametrize(
    ("family", "flag", "zeros"),
    [("sdxl", True, True), ("sdxl", None, True), ("sdxl", False, False), ("sd15", None, False)],
)
def test_they_are_those_of_the_pipeline_s_unconditional_branch(
    experiment, flagged, tiny_pipelines, family, flag, zeros
):
    folder = flagged(flag) if family == "sdxl" else tiny_pipelines[family]
    path = experiment(family, empty_prompt_rate=0.1)
    config = load_config(path, [f"model.path={folder}"])
    model = ModelFolder.resolve(config.model)
    pipeline = model.family.pipeline(model, torch.float32)
    _, negative, *pooled = pipeline.encode_prompt(
        prompt="x", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    expected = {"prompt_embeds": negative} | ({"pooled": pooled[1]} if pooled else {})
    found = dropped(config)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
        assert bool((found[name] == 0).all()) == zeros


def test_the_released_trainers_way_is_a_key(experiment):
    config = load_config(experiment(empty_prompt_rate=0.1, empty_prompt="encoded"))
    model = ModelFolder.resolve(config.model)
    encoded = PairCache.open(config, model=model).empty_prompt()
    assert all(bool(values.abs().sum() > 0) for values in encoded.values())
    found = dropped(config)
    assert all(torch.equal(found[name], encoded[name]) for name in encoded)


@pytest.fixture
def told(monkeypatch):
    """The conditions of each forward pass."""
    seen, predict = [], UNetFamily.predict

    def watching(family, model, noised, conditions):
        seen.append(conditions)
        return predict(family, model, noised, conditions)

    monkeypatch.setattr(UNetFamily, "predict", watching)
    return seen


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_policy_and_reference_are_told_it(experiment, tiny_caches, tmp_path, told, reference):
    """All captions are dropped, so that nothing else can be told."""
    caches = shutil.copytree(tiny_caches, tmp_path / "caches")
    path = experiment(
        empty_prompt_rate=1 - 2**-24, max_steps=1, reference=reference, checkpoint_every=1
    )
    config = load_config(path, [f"prepare.cache_dir={caches / 'sdxl'}"])
    if reference == "cached":
        prepare_reference(config, 1, progress=False)
    train(config, progress=False)
    assert len(told) >= 2
    assert not any(
        bool(given[name].any()) for given in told for name in ("prompt_embeds", "pooled")
    )
    assert all(bool(given["add_time_ids"].any()) for given in told), "that is not of the caption"


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        ({"empty_prompt_rate": 0.1}, {"train.empty_prompt": "zeros"}),
        ({"empty_prompt_rate": 0.1, "empty_prompt": "encoded"}, {}),
        ({}, {}),
    ],
)
def test_reference_errors_know_what_they_were_conditioned_on(experiment, options, noted):
    config = load_config(experiment(**options))
    model = ModelFolder.resolve(config.model)
    cache, noise = PairCache.open(config, model=model), setup_noise(config, model)
    identity = reference_identity(config, model, cache, noise)
    assert {k: v for k, v in identity.items() if k == "train.empty_prompt"} == noted


def saved_before(path):
    """The configuration as a checkpoint of a version without the key holds it."""
    saved = yaml.safe_load(dump_config(load_config(path)))
    del saved["train"]["empty_prompt"]
    return saved


def test_a_run_that_began_without_the_key_goes_on_as_it_began(experiment):
    path, lines = experiment(empty_prompt_rate=0.1), []
    config, saved = load_config(path), saved_before(path)
    resumed, changes = resumed_config(config, saved, (), (), step=2, tell=lines.append)
    assert resumed.train.empty_prompt == "encoded"
    assert changes == ()
    assert "train.empty_prompt is encoded, as the run began" in lines[0]
    assert differing_keys(saved, resumed) == []
    assert differing_keys(saved, config) == ["train.empty_prompt: 'encoded' there, 'pipeline' here"]


def test_a_run_that_dropped_no_caption_has_nothing_to_tell(experiment):
    path, lines = experiment(), []
    config, saved = load_config(path), saved_before(path)
    assert resumed_config(config, saved, (), (), step=2, tell=lines.append) == (config, ())
    assert completed(saved)["train"]["empty_prompt"] == "pipeline"
    assert lines == differing_keys(saved, config) == []
