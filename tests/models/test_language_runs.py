"""Families whose prompts a language model reads, through the whole program, to diffusers."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastpo.config import parse_config
from fastpo.config.sections import PrepareConfig
from fastpo.data.cache import PairCache
from fastpo.data.prepare import prepare
from fastpo.errors import ConfigError, ModelError
from fastpo.models.denoisers import add_lora
from fastpo.models.folder import ModelFolder
from fastpo.testing import write_folder
from fastpo.testing.language_pipelines import (
    tiny_flux2_dev_folder,
    tiny_flux2_klein_folder,
    tiny_qwen_image_folder,
    tiny_z_image_folder,
)
from fastpo.train import train
from fastpo.types import NoisedPair

MAKERS = {
    "z-image": tiny_z_image_folder,
    "qwen-image": tiny_qwen_image_folder,
    "flux2-klein": tiny_flux2_klein_folder,
    "flux2-dev": tiny_flux2_dev_folder,
}


@pytest.fixture(scope="module", params=MAKERS)
def prepared(request, tmp_path_factory):
    """A tiny model and the cache of pairs of two sizes; `config(name, ...)` of a run over it."""
    root = tmp_path_factory.mktemp(request.param)
    model = MAKERS[request.param](root / "model")
    write_folder(root / "data", 4, sizes=((24, 24), (24, 24), (32, 20)))

    def config(name, **options):
        raw = {
            "seed": 3,
            "model": {"path": str(model)},
            "data": {"source": "folder", "path": str(root / "data")},
            "prepare": {
                "cache_dir": str(root / "cache"),
                "resolution": 16,
                "text_length": 64,
                "store_precision": "fp32",
                "text_precision": "fp32",
                "workers": 0,
            },
            "train": {
                "output_dir": str(root / name),
                "objective": {"name": "dpo", "beta": 20.0},
                "max_steps": 2,
                "micro_batch_size": 2,
                "precision": "fp32",
                "optim": {"lr": 1e-2, "schedule": "constant"},
                "gradient_checkpointing": True,
                "trackers": [],
            }
            | options,
        }
        if options.get("method", "lora") == "lora":
            targets = list(ModelFolder(model).family.lora_targets)
            raw["train"]["lora"] = {"rank": 4, "alpha": 8.0, "target_modules": targets}
        return parse_config(raw)

    prepare(config("unused"), progress=False)
    return SimpleNamespace(name=request.param, root=root, model=ModelFolder(model), config=config)


def test_the_cache_holds_both_sizes_and_texts_of_one_length(prepared):
    cache = PairCache.open(prepared.config("unused"), verify=True)
    assert cache.family == prepared.name
    assert len(cache.latent_shapes) == 2
    conditions = cache.read([0, 1], 0).conditions
    assert conditions["prompt_embeds"].shape[1] == 64


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_a_run_exports_the_stock_pipeline_loads(prepared, method):
    family, model = prepared.model.family, prepared.model
    run = train(prepared.config(method, method=method), progress=False)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
    assert len(losses) == 2
    assert all(loss == loss for loss in losses)

    trained = family.load_denoiser(model)
    if method == "lora":
        add_lora(family, trained, prepared.config("unused").train.lora)
    end = load_file(run / "checkpoints" / "step-00000002" / "trainable.safetensors")
    assert trained.load_state_dict(end, strict=False).unexpected_keys == []

    if method == "lora":
        pipeline = family.pipeline_class.from_pretrained(model.path)
        names = load_file(run / "final" / "pytorch_lora_weights.safetensors")
        assert all(name.startswith("transformer.") for name in names)
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
        pipeline.load_lora_weights(run / "final")
        loaded = pipeline.transformer
    else:
        loaded = family.denoiser_class.from_pretrained(run / "final", subfolder="transformer")
    plain = family.load_denoiser(model)
    answers = [predicted(prepared, model_) for model_ in (loaded, trained, plain)]
    torch.testing.assert_close(answers[0], answers[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answers[0], answers[2], atol=1e-4)


def predicted(prepared, denoiser):
    config = prepared.config("unused")
    batch = PairCache.open(config).read([0, 1], 0)
    place = torch.tensor([500, 800])
    schedule = prepared.model.family.schedule(prepared.model, 16)
    latents = batch.latent_mean
    noised = NoisedPair(latents, place, schedule.timesteps[place], latents)
    with torch.no_grad():
        return prepared.model.family.predict(denoiser.eval(), noised, batch.conditions)


def changed(folder, file, **values):
    """Changes a JSON file of a model; the family looks at it anew."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return ModelFolder(folder)


@pytest.mark.parametrize(
    ("make", "file", "values", "text"),
    [
        (
            tiny_z_image_folder,
            "model_index.json",
            {"_class_name": "ZImageOmniPipeline"},
            "trains ZImagePipeline, not its relative 'ZImageOmniPipeline'",
        ),
        (
            tiny_z_image_folder,
            "text_encoder/config.json",
            {"hidden_size": 32},
            "1 x 32 numbers a token, the transformer reads 16: they are of different models",
        ),
        (
            tiny_z_image_folder,
            "text_encoder/config.json",
            {"model_type": "qwen2_5_vl"},
            r"text_encoder/config\.json: the text encoder of z-image is a Qwen3ForCausalLM, of "
            "model_type 'qwen3'; got 'qwen2_5_vl'",
        ),
        (
            tiny_qwen_image_folder,
            "model_index.json",
            {"_class_name": "QwenImageLayeredPipeline"},
            "not its relative 'QwenImageLayeredPipeline'",
        ),
        (
            tiny_qwen_image_folder,
            "scheduler/scheduler_config.json",
            {"base_shift": 1.1, "max_shift": 1.1},
            r"base_shift and max_shift are both 1\.1, .*\(Lightning\)",
        ),
        (
            tiny_qwen_image_folder,
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler"},
            "qwen-image is trained with flow matching, .*; got 'DDIMScheduler'",
        ),
        (
            tiny_qwen_image_folder,
            "transformer/config.json",
            {"zero_cond_t": True},
            "zero_cond_t is set",
        ),
        (
            tiny_qwen_image_folder,
            "vae/config.json",
            {"latents_std": None},
            "no latents_mean and latents_std",
        ),
        (
            tiny_flux2_klein_folder,
            "model_index.json",
            {"is_distilled": True},
            r"is_distilled is set: .*FLUX\.2-klein-base",
        ),
        (
            tiny_flux2_klein_folder,
            "model_index.json",
            {"_class_name": "Flux2KleinInpaintPipeline"},
            "trains Flux2KleinPipeline, not its relative",
        ),
        (
            tiny_flux2_klein_folder,
            "text_encoder/config.json",
            {"num_hidden_layers": 26},
            "reads layer 27 of its text encoder, which has 26",
        ),
        (
            tiny_flux2_dev_folder,
            "vae/config.json",
            {"_class_name": "AutoencoderKL"},
            "AutoencoderKLFlux2 of 32 channels, got 'AutoencoderKL'",
        ),
    ],
)
def test_what_cannot_be_trained_right_is_refused_by_name(folders, make, file, values, text):
    with pytest.raises(ModelError, match=text) as caught:
        changed(folders(make), file, **values).family  # noqa: B018
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each maker's folder, made once."""
    root = tmp_path_factory.mktemp("made")
    return {make: make(root / make.__name__) for make in MAKERS.values()}


@pytest.fixture
def folders(made, tmp_path):
    """`folders(make)`: a copy that a test may break."""
    return lambda make: shutil.copytree(made[make], tmp_path / "model")


def test_weights_of_the_text_encoder_that_are_missing_are_named(folders):
    folder = folders(tiny_qwen_image_folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    model, config = ModelFolder(folder), PrepareConfig(cache_dir=folder / "unused")
    with pytest.raises(ModelError, match=r"text_encoder could not be loaded: .* holds no weights"):
        model.family.load_encoders(model, config, torch.device("cpu"))


@pytest.mark.parametrize(
    "make", [tiny_z_image_folder, tiny_flux2_klein_folder, tiny_flux2_dev_folder]
)
@pytest.mark.parametrize("template", [None, "{{ raise_exception('no user') }}"])
def test_a_tokenizer_without_a_chat_is_refused_before_weights_are_read(folders, make, template):
    folder = folders(make)
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    model, config = ModelFolder(folder), PrepareConfig(cache_dir=folder / "unused")
    text = r"tokenizer: this tokenizer's chat template .*, is missing or broken: "
    with pytest.raises(ModelError, match=text) as caught:
        model.family.load_encoders(model, config, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_text_longer_than_the_pipeline_takes_is_refused(made):
    model = ModelFolder(made[tiny_qwen_image_folder])
    config = PrepareConfig(cache_dir=model.path / "unused", text_length=2048)
    with pytest.raises(ConfigError, match="qwen-image reads at most 1024 tokens, got 2048"):
        model.family.load_encoders(model, config, torch.device("cpu"))


@pytest.mark.parametrize("name", MAKERS)
def test_prompts_that_are_cut_are_counted(made, name):
    model = ModelFolder(made[MAKERS[name]])
    config = PrepareConfig(cache_dir=model.path / "unused", text_length=64)
    encoders = model.family.load_encoders(model, config, torch.device("cpu"))
    long = "a" * 2000
    assert encoders.count_cut([long, long]) == 2
    assert encoders.encode_prompts([long])["prompt_embeds"].shape[1] == 64
