"""Weights in variants that some components have, and tokenizers that do not tell their length."""

import json
import shutil

import pytest
import torch

from fastpo.config import ModelConfig
from fastpo.config.sections import PrepareConfig
from fastpo.errors import ModelError
from fastpo.models.folder import ModelFolder


@pytest.fixture
def own(tiny_pipelines, tmp_path):
    return shutil.copytree(tiny_pipelines["sdxl"], tmp_path / "model")


def halve(part):
    """Renames a component's weights to those of the variant fp16."""
    [file] = part.glob("*.safetensors")
    file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))


def everything(folder, **options):
    """All that the commands load of a model: encoders, denoiser, pipeline."""
    model = ModelFolder.resolve(ModelConfig(path=str(folder), **options))
    config = PrepareConfig(cache_dir=folder / "unused")
    encoders = model.family.load_encoders(model, config, torch.device("cpu"))
    pipeline = model.family.pipeline(model, torch.float32)
    return encoders, model.family.load_denoiser(model), pipeline


@pytest.mark.parametrize("parts", [("unet",), ("vae", "text_encoder"), ("text_encoder_2",)])
def test_a_variant_that_some_components_have(own, parts):
    for part in parts:
        halve(own / part)
    encoders, denoiser, pipeline = everything(own, variant="fp16")
    for mine, theirs in ((denoiser, pipeline.unet), (encoders.vae, pipeline.vae)):
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))


def test_a_vae_of_a_variant_alone(own, tiny_pipelines, tmp_path):
    vae = shutil.copytree(own / "vae", tmp_path / "vae")
    halve(vae)
    encoders, _, pipeline = everything(own, vae=str(vae), variant="fp16")
    assert all(map(torch.equal, encoders.vae.parameters(), pipeline.vae.parameters()))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_variant_that_was_not_asked_for_is_named(own, part):
    halve(own / part)
    with pytest.raises(ModelError, match=rf"{part} holds weights of the variant fp16 alone: set"):
        everything(own)


def test_a_folder_without_weights_says_what_is_there(own):
    [file] = (own / "vae").glob("*.safetensors")
    file.unlink()
    shutil.rmtree(own / "text_encoder_2")
    with pytest.raises(ModelError, match=r"text_encoder_2 is missing"):
        everything(own)
    (own / "text_encoder_2").mkdir()
    with pytest.raises(ModelError, match=r"vae holds no weights \(found: config\.json\)"):
        everything(own)


def test_a_tokenizer_without_a_length_has_its_encoder_s(own):
    before, *_ = everything(own)
    for name in ("tokenizer", "tokenizer_2"):
        path = own / name / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config["model_max_length"]
        path.write_text(json.dumps(config))
    encoders, _, pipeline = everything(own)
    expected, found = (each.encode_prompts(["a cat", ""]) for each in (before, encoders))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    embeddings = pipeline.encode_prompt(
        ["a cat", ""], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(embeddings[0], expected["prompt_embeds"])
