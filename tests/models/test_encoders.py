"""The frozen encoders against the pipelines, and what model folders are refused."""

import json
import shutil

import pytest
import torch
from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image

from fastpo.config import parse_config
from fastpo.data.cache.fingerprint import cache_fingerprint
from fastpo.errors import ConfigError, ModelError, NonFiniteLatentsError
from fastpo.models.encoders import Encoders
from fastpo.models.folder import (
    ModelFolder,
    component_files,
    digest_files,
    resolve_model_folder,
    resolve_vae_folder,
)
from fastpo.models.registry import detect

PROMPTS = ["a cat", "", "Ünïcode, (punctuation) and CAPITALS", "word " * 60]


pytestmark = pytest.mark.usefixtures("one_thread")


def config_for(folder, **prepare):
    return parse_config(
        {
            "model": {"path": str(folder)},
            "data": {"source": "folder", "path": "unused"},
            "prepare": {"cache_dir": "unused", **prepare},
            "train": {"output_dir": "unused", "objective": {"name": "sft"}, "max_steps": 1},
        }
    )


@pytest.fixture
def copy_of(tiny_pipelines, tmp_path):
    """A copy of a pipeline folder with some configuration keys replaced."""

    def copy(family, component="unet", **changes):
        folder = tmp_path / "copy"
        shutil.copytree(tiny_pipelines[family], folder)
        path = folder / component / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return copy


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prompts_equal_the_pipelines_exactly(tiny_pipelines, family, precision):
    encoders = Encoders.load(
        config_for(tiny_pipelines[family], text_precision=precision), device="cpu"
    )
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_pipelines[family], dtype=dtype)
    if family == "sd15":
        expected, pooled = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0], None
    else:
        expected, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False
        )
    wanted = {"prompt_embeds": expected} | ({} if pooled is None else {"pooled": pooled})
    got = encoders.encode_prompts(PROMPTS)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], tensor)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_images_give_the_posterior(tiny_pipelines, family):
    encoders = Encoders.load(config_for(tiny_pipelines[family]), device="cpu")
    pixels = torch.rand(2, 3, 32, 16) * 2 - 1
    mean, logvar = encoders.encode_images(pixels)
    with torch.no_grad():
        expected = encoders.vae.encode(pixels).latent_dist
    assert mean.shape == logvar.shape == (2, 4, 8, 4)
    assert torch.equal(mean, expected.mean)
    assert torch.equal(logvar, expected.logvar)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 7], ids=["mean", "logvar"])
def test_latents_that_are_not_finite_are_refused_with_advice(tiny_pipelines, value, channel):
    """Of the moments' channels the first half are means; the posterior clamps the second."""
    config = config_for(tiny_pipelines["sd15"], vae_precision="fp16")
    encoders = Encoders.load(config, device="cpu")

    def spoil(module, inputs, output):
        output[1, channel, 0, 0] = value
        return output

    encoders.vae.quant_conv.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLatentsError, match=r"float16.*vae_precision=fp32.*fp16-fix") as e:
        encoders.encode_images(torch.zeros(3, 3, 16, 16))
    assert e.value.rows == [1]


def test_an_sdxl_vae_that_asks_for_upcasting_is_refused_in_fp16(tiny_pipelines, copy_of):
    """diffusers' SDXL pipelines upcast such a VAE; an fp16-fix VAE says false."""
    with pytest.raises(ConfigError, match=r"vae_precision: fp16.*force_upcast.*bf16.*model\.vae"):
        Encoders.load(config_for(tiny_pipelines["sdxl"], vae_precision="fp16"), device="cpu")
    fixed = copy_of("sdxl", "vae", force_upcast=False)
    assert Encoders.load(config_for(fixed, vae_precision="fp16"), device="cpu").vae is not None
    Encoders.load(config_for(tiny_pipelines["sd15"], vae_precision="fp16"), device="cpu")


def test_weights_are_frozen_and_in_the_asked_precision(tiny_pipelines):
    encoders = Encoders.load(
        config_for(tiny_pipelines["sdxl"], vae_precision="bf16", text_precision="fp16"),
        device="cpu",
    )
    assert encoders.vae.dtype == torch.bfloat16
    assert {e.dtype for e in encoders.text_encoders} == {torch.float16}
    modules = (encoders.vae, *encoders.text_encoders)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for m in modules)


def test_families_are_told_apart(tiny_pipelines):
    assert {family: detect(tiny_pipelines[family]).name for family in tiny_pipelines} == {
        "sdxl": "sdxl",
        "sd15": "sd15",
    }


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"in_channels": 9}, "maps 9 to 4 channels"),
        ({"addition_embed_type": "image"}, "'image'"),
        ({"class_embed_type": "projection"}, "conditioning beside the text"),
        ({"num_class_embeds": 10}, "its num_class_embeds is 10"),
        ({"time_cond_proj_dim": 256}, "its time_cond_proj_dim is 256"),
        ({"encoder_hid_dim": 768}, "its encoder_hid_dim is 768"),
        ({"attention_type": "gated"}, "attention_type is 'gated'"),
        ({"_class_name": "UNetMotionModel"}, "its unet is a 'UNetMotionModel'"),
    ],
)
def test_other_unets_are_refused(copy_of, changes, complaint):
    with pytest.raises(ModelError, match=complaint):
        detect(copy_of("sd15", **changes))


def test_refiner_is_refused(copy_of):
    folder = copy_of("sdxl")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ModelError, match="refiner"):
        detect(folder)


def test_model_without_unet_is_refused(copy_of):
    folder = copy_of("sd15")
    (folder / "unet").rename(folder / "transformer")
    with pytest.raises(ModelError, match=r"no unet/config\.json.*transformer/"):
        detect(folder)


def test_missing_folder_and_missing_index_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"no such folder: .*/nowhere"):
        resolve_model_folder(str(tmp_path / "nowhere"))
    (tmp_path / "something.txt").touch()
    with pytest.raises(ModelError, match=r"no model_index\.json \(found: something\.txt\)"):
        resolve_model_folder(str(tmp_path))


def test_missing_part_is_named(copy_of):
    folder = copy_of("sdxl")
    shutil.rmtree(folder / "text_encoder_2")
    (folder / "text_encoder_2").mkdir()
    with pytest.raises(ModelError, match="text_encoder_2 could not be loaded"):
        Encoders.load(config_for(folder), device="cpu")


def test_unreachable_hub_model_is_a_clear_error(monkeypatch):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    def fail(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(DiffusionPipeline, "download", fail)
    with pytest.raises(ModelError, match=r"could not be fetched from the hub.*no connection"):
        resolve_model_folder("owner/model", "main", "fp16")


def test_vae_may_be_a_pipeline_or_its_own_folder(tiny_pipelines):
    folder = tiny_pipelines["sdxl"]
    assert resolve_vae_folder(str(folder)) == resolve_vae_folder(str(folder / "vae"))
    with pytest.raises(ModelError, match=r"model\.vae: .* holds no VAE"):
        resolve_vae_folder(str(folder / "unet"))


def test_digest_sees_weights_but_not_version_notes(copy_of):
    folder = copy_of("sd15") / "vae"
    before = digest_files(component_files(folder))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "9.9"}))
    assert digest_files(component_files(folder)) == before
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 1.0}))
    assert digest_files(component_files(folder)) != before


def test_variant_weights_hide_the_plain_ones(copy_of):
    folder = copy_of("sd15") / "vae"
    plain = folder / "diffusion_pytorch_model.safetensors"
    half = folder / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(plain, half)
    (folder / "diffusion_pytorch_model.bin").touch()
    config = folder / "config.json"
    assert component_files(folder, "fp16") == [config, half]
    assert component_files(folder) == component_files(folder, "bf16") == [config, plain]


CENTER, SPREAD = [-1.6, 0.7, 2.9, -0.1], [5.2, 4.1, 3.3, 0.5]


def test_latents_are_normalized_by_channel_as_the_pipeline_undoes(copy_of):
    """The last lines of the pipeline's `__call__` make the image again."""
    folder = copy_of("sdxl", "vae", latents_mean=CENTER, latents_std=SPREAD)
    encoders = Encoders.load(config_for(folder), device="cpu")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = encoders.encode_images(pixels)
    posterior = encoders.vae.encode(pixels).latent_dist
    spread = torch.tensor(SPREAD).view(-1, 1, 1)
    torch.testing.assert_close((0.5 * logvar).exp() * spread, posterior.std)

    pipeline = AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents = mean * pipeline.vae.config.scaling_factor
    # The last step's result is put in place of the sampled latents.
    image = pipeline(
        "x",
        height=32,
        width=32,
        num_inference_steps=1,
        num_images_per_prompt=2,
        callback_on_step_end=lambda *_: {"latents": latents},
        output_type="pt",
    ).images
    expected = (encoders.vae.decode(posterior.mode()).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["latents_mean", "latents_std"])
def test_half_a_normalization_is_none_as_in_the_pipeline(copy_of, missing):
    values = {"latents_mean": CENTER, "latents_std": SPREAD} | {missing: None}
    encoders = Encoders.load(config_for(copy_of("sdxl", "vae", **values)), device="cpu")
    pixels = torch.zeros(1, 3, 32, 32)
    expected = encoders.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(encoders.encode_images(pixels)[0], expected)


def test_sd15_leaves_latents_as_its_pipeline_does(copy_of):
    values = {"latents_mean": CENTER, "latents_std": SPREAD}
    encoders = Encoders.load(config_for(copy_of("sd15", "vae", **values)), device="cpu")
    pixels = torch.zeros(1, 3, 32, 32)
    expected = encoders.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(encoders.encode_images(pixels)[0], expected)


def test_a_cache_says_that_its_latents_are_normalized(copy_of):
    config = config_for(copy_of("sdxl", "vae", latents_mean=CENTER, latents_std=SPREAD))
    model = ModelFolder.resolve(config.model)
    fields = cache_fingerprint(config, model).fields
    assert fields["latent normalization"] == repr((CENTER, SPREAD))


def test_a_cache_of_a_plain_vae_is_the_one_it_was(tiny_pipelines):
    config = config_for(tiny_pipelines["sdxl"])
    fields = cache_fingerprint(config, ModelFolder.resolve(config.model)).fields
    assert "latent normalization" not in fields
