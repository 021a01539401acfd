"""Long prompts in chunks or cut and counted, layers left out, and paths below the user's folder."""

import json
from pathlib import Path

import pytest
import torch

from fastpo.config import Config, flatten, load_config, parse_config
from fastpo.data.cache import PairCache
from fastpo.data.cache.fingerprint import cache_fingerprint
from fastpo.data.prepare import prepare
from fastpo.errors import CacheError, ConfigError
from fastpo.evaluate.sampling import ImageSampler
from fastpo.models.folder import ModelFolder
from fastpo.testing import write_folder
from fastpo.testing.flow import tiny_flux_folder
from fastpo.train import train
from fastpo.train.zero import read_json

LONG = " ".join("x" * 100)
"""A hundred words of one token each."""


@pytest.fixture
def encoders(config_for):
    """`encoders(family, **keys of prepare)`."""

    def load(family, **options):
        config = config_for(family, prepare=options)
        model = ModelFolder.resolve(config.model)
        return model.family.load_encoders(model, config.prepare, torch.device("cpu"))

    return load


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_chunks_lie_behind_one_another_each_as_a_prompt_of_its_own(encoders, family):
    one, two = encoders(family), encoders(family, prompt_chunks=2)
    found = two.encode_prompts([LONG, "a cat", ""])
    parts = [" ".join("x" * 75), "a cat", ""], [" ".join("x" * 25), "", ""]
    first, second = (one.encode_prompts(texts) for texts in parts)
    expected = torch.cat([first["prompt_embeds"], second["prompt_embeds"]], dim=1)
    torch.testing.assert_close(found["prompt_embeds"], expected)
    assert found.keys() == first.keys()
    if "pooled" in first:
        torch.testing.assert_close(found["pooled"], first["pooled"])


def test_what_is_longer_is_counted(encoders):
    prompts = [LONG, " ".join("x" * 75), " ".join("x" * 76), ""]
    assert encoders("sdxl").count_cut(prompts) == 2
    assert encoders("sdxl", prompt_chunks=2).count_cut(prompts) == 0
    assert encoders("sd15", prompt_chunks=2).count_cut([LONG * 2]) == 1


def test_prepare_says_how_many_prompts_were_cut(config_for, tmp_path):
    write_folder(tmp_path / "data", 3)
    lines = (tmp_path / "data" / "pairs.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"prompt": LONG}
    (tmp_path / "data" / "pairs.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]))
    told = "1 prompt is longer than the text encoders read, and cut (see prepare.prompt_chunks)"
    assert told in prepare(config_for(), progress=False).summary()
    assert told in prepare(config_for(), progress=False).summary(), "found finished"
    whole = config_for(prepare={"prompt_chunks": 2, "cache_dir": str(tmp_path / "whole")})
    assert "cut" not in (prepare(whole, progress=False).summary() or "")


def test_families_with_long_texts_say_with_which_key_less_is_cut(config_for, tmp_path):
    write_folder(tmp_path / "data", 2)
    model = {"path": str(tiny_flux_folder(tmp_path / "flux"))}
    config = config_for(model=model, prepare={"text_length": 2})
    told = "2 prompts are longer than the text encoders read, and cut (see prepare.text_length)"
    assert told in prepare(config, progress=False).summary()


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_layers_are_left_out_as_the_pipeline_does(encoders, tiny_pipelines, family):
    from diffusers import AutoPipelineForText2Image

    found = encoders(family, clip_skip=1).encode_prompts(["a cat"])["prompt_embeds"]
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_pipelines[family])
    if family == "sd15":  # the pipeline reads `text_encoder.text_model`, gone in transformers 5.6
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    expected, *_ = pipeline.encode_prompt(
        "a cat",
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=1,
    )
    torch.testing.assert_close(found, expected)
    plain = encoders(family).encode_prompts(["a cat"])["prompt_embeds"]
    assert not torch.allclose(found, plain)


def test_more_layers_than_there_are_cannot_be_left_out(encoders):
    with pytest.raises(ConfigError, match=r"clip_skip: .* has 1 layers to leave out, got 2"):
        encoders("sdxl", clip_skip=2)
    assert encoders("sd15", clip_skip=2)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_images_are_sampled_as_prompts_were_encoded(config_for, encoders, family):
    options = {"prompt_chunks": 2, "clip_skip": 1}
    config = config_for(family, prepare=options)
    sampler = ImageSampler(config, progress=False)
    given = sampler.family.prompt_arguments(sampler.pipeline, [LONG, "a"], config.prepare)
    expected = encoders(family, **options).encode_prompts([LONG, "a"])
    torch.testing.assert_close(given["prompt_embeds"], expected["prompt_embeds"])
    negative = given["negative_prompt_embeds"]
    assert negative.shape == given["prompt_embeds"].shape
    assert bool((negative == 0).all()) == (family == "sdxl")
    image = sampler.pipeline(**given, height=32, width=32, num_inference_steps=1).images[0]
    assert image.size == (32, 32)
    usual = config_for(family)
    plain = sampler.family.prompt_arguments(sampler.pipeline, ["a"], usual.prepare)
    assert plain == {"prompt": ["a"]}


def test_earlier_caches_and_images_have_the_identity_that_they_had(config_for, tmp_path):
    write_folder(tmp_path / "data", 1)
    config = config_for()
    fields = cache_fingerprint(config, ModelFolder.resolve(config.model)).fields
    assert "prepare.vae_precision" in fields
    assert not {"prepare.prompt_chunks", "prepare.clip_skip"} & fields.keys()
    settings = ImageSampler(config).settings
    assert not {"prepare.prompt_chunks", "prepare.clip_skip"} & settings.keys()
    prepare(config, progress=False)
    other = config_for(prepare={"clip_skip": 1})
    assert ImageSampler(other).settings["prepare.clip_skip"] == 1
    with pytest.raises(CacheError, match=r"prepare\.clip_skip: the configuration gives '1'"):
        PairCache.open(other)


def test_a_run_trains_on_chunks(experiment, tmp_path):
    overrides = ["prepare.prompt_chunks=2", f"prepare.cache_dir={tmp_path / 'cache'}"]
    config = load_config(experiment("sdxl", max_steps=1), [*overrides, "data.limit=2"])
    cache = prepare(config, progress=False)
    assert cache.read([0], 0).conditions["prompt_embeds"].shape[1] == 2 * 77
    assert (train(config, progress=False) / "final").is_dir()


def test_a_tilde_is_the_user_s_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = {
        "model": {"path": "~/model"},
        "data": {"source": "folder", "path": "~/data"},
        "prepare": {"cache_dir": "~/cache"},
        "train": {"output_dir": "~/run", "objective": {"name": "sft"}, "max_steps": 1},
        "evaluate": {"prompts_file": "~/prompts.txt"},
    }
    config = parse_config(raw)
    paths = {k: v for k, v in flatten(config.model_dump()).items() if isinstance(v, Path)}
    assert paths == {
        "prepare.cache_dir": tmp_path / "cache",
        "train.output_dir": tmp_path / "run",
        "evaluate.prompts_file": tmp_path / "prompts.txt",
    }
    assert isinstance(config, Config)
    (tmp_path / "zero.json").write_text('{"own": 1}')
    assert read_json("~/zero.json") == {"own": 1}
