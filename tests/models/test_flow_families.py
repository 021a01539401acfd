"""What families of flow matching refuse, by name and before anything is encoded."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from fastpo.cli import main
from fastpo.config.sections import PrepareConfig
from fastpo.errors import ConfigError, ModelError
from fastpo.models.folder import ModelFolder
from fastpo.testing import write_folder
from fastpo.testing.flow import tiny_flux_folder, tiny_sana_folder, tiny_sd3_folder
from fastpo.types import NoisedPair

DISTILLED = r"(?i)by its name \((turbo|lightning)\) .* few steps"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_sd3_folder(tmp_path_factory.mktemp("models") / "sd3")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def own(sd3, tmp_path):
    """A copy of the folder that a test may break."""
    return shutil.copytree(sd3, tmp_path / "model")


def family(folder):
    return ModelFolder(folder).family


@pytest.mark.parametrize(
    ("file", "values", "text"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusion3InpaintPipeline"},
            "trains StableDiffusion3Pipeline, not its relative 'StableDiffusion3InpaintPipeline'",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusion3ControlNetPipeline"},
            "not its relative 'StableDiffusion3ControlNetPipeline'",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler"},
            "sd3 is trained with flow matching, .* FlowMatchEulerDiscreteScheduler; got 'DDIM",
        ),
        (
            "scheduler/scheduler_config.json",
            {"invert_sigmas": True},
            "not trained with invert_sigmas",
        ),
        (
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True},
            "sd3 is not trained with use_dynamic_shifting",
        ),
        (
            "scheduler/scheduler_config.json",
            {"stochastic_sampling": True},
            "not trained with stochastic_sampling",
        ),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 100},
            "was trained with num_train_timesteps 1000, got 100",
        ),
        (
            "transformer/config.json",
            {"_class_name": "FluxTransformer2DModel"},
            "the transformer of StableDiffusion3Pipeline is a SD3Transformer2DModel, got 'FluxT",
        ),
        ("vae/config.json", {"latent_channels": 4}, "AutoencoderKL of 16 channels, got .* of 4"),
    ],
)
def test_what_cannot_be_trained_right_is_refused_by_name(own, file, values, text):
    change(own / file, **values)
    with pytest.raises(ModelError, match=text) as caught:
        family(own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "stable-diffusion-3.5-large-turbo",
        "SD3_Lightning_4step",
        "models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/0123",
        "Z-Image-Turbo/diffusers",
        "Z-Image-Turbo/models/bf16",
    ],
)
def test_models_distilled_to_few_steps_are_refused_by_their_name(sd3, tmp_path, name):
    shutil.copytree(sd3, tmp_path / name)
    with pytest.raises(ModelError, match=DISTILLED):
        family(tmp_path / name)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize(
    "name",
    [
        "stabilityai/stable-diffusion-3.5-large-turbo",
        "/cache/models--Tongyi-MAI--Z-Image-Turbo/snapshots/0123/transformer",
    ],
)
def test_and_by_the_name_that_diffusers_wrote_down(own, file, name):
    change(own / file, _name_or_path=name)
    with pytest.raises(ModelError, match=DISTILLED) as caught:
        family(own)
    assert str(caught.value).startswith(f"{own / file}: ")


@pytest.mark.parametrize("name", ["turbo/my-model", "turbocharged", "schnellstart/model"])
def test_other_folders_names_say_nothing(sd3, tmp_path, name):
    shutil.copytree(sd3, tmp_path / name)
    assert family(tmp_path / name).name == "sd3"


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_2"])
def test_a_missing_encoder_is_named(own, part):
    shutil.rmtree(own / part)
    with pytest.raises(ModelError, match=f"{part}/ is missing, with which sd3 encodes prompts"):
        family(own)


@pytest.mark.parametrize(("key", "value"), [("prompt_chunks", 2), ("clip_skip", 1)])
def test_ways_of_encoding_that_clip_alone_has_are_refused(sd3, key, value):
    model, config = ModelFolder(sd3), PrepareConfig(cache_dir=sd3 / "unused", **{key: value})
    with pytest.raises(ConfigError, match=f"prepare.{key}: sd3 has no such way of encoding"):
        model.family.load_encoders(model, config, torch.device("cpu"))


def test_a_resolution_beyond_the_table_of_positions_is_refused(sd3):
    model = ModelFolder(sd3)
    assert model.family.geometry(model, 128, buckets=False).buckets == ((128, 128),)
    with pytest.raises(ConfigError, match=r"sides of up to 132 px, but .* has places for 128 px"):
        model.family.geometry(model, 132, buckets=False)


def test_longer_text_is_cut_and_counted_at_the_length_asked_for(sd3):
    model, config = ModelFolder(sd3), PrepareConfig(cache_dir=sd3 / "unused", text_length=16)
    encoders = model.family.load_encoders(model, config, torch.device("cpu"))
    assert encoders.encode_prompts(["a cat"])["prompt_embeds"].shape == (1, 77 + 16, 48)
    assert encoders.count_cut(["a cat", "a cat on a red house"]) == 1


@pytest.mark.parametrize(
    ("make", "file", "values", "text"),
    [
        (
            tiny_flux_folder,
            "model_index.json",
            {"_class_name": "FluxFillPipeline"},
            "not its relative 'FluxFillPipeline'",
        ),
        (
            tiny_flux_folder,
            "transformer/config.json",
            {"guidance_embeds": False},
            r"guidance_embeds is false\), as FLUX.1-schnell's",
        ),
        (
            tiny_flux_folder,
            "transformer/config.json",
            {"in_channels": 384},
            "this transformer maps 384 to 64",
        ),
        (
            tiny_flux_folder,
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": False},
            "the noise of flux is shifted by the resolution",
        ),
        (
            tiny_flux_folder,
            "scheduler/scheduler_config.json",
            {"use_karras_sigmas": True},
            "flux is not trained with use_karras_sigmas",
        ),
        (
            tiny_sana_folder,
            "model_index.json",
            {"_class_name": "SanaSprintPipeline"},
            "not its relative 'SanaSprintPipeline'",
        ),
        (
            tiny_sana_folder,
            "scheduler/scheduler_config.json",
            {"prediction_type": "epsilon"},
            "with use_flow_sigmas and prediction_type: flow_prediction; got .* 'epsilon'",
        ),
        (
            tiny_sana_folder,
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 100},
            "sana was trained with num_train_timesteps 1000, got 100",
        ),
        (
            tiny_sana_folder,
            "scheduler/scheduler_config.json",
            {"use_exponential_sigmas": True},
            "sana is not trained with use_exponential_sigmas",
        ),
        (
            tiny_sana_folder,
            "transformer/config.json",
            {"guidance_embeds": True},
            "as in Sana-Sprint, which was distilled",
        ),
    ],
)
def test_relatives_of_flux_and_sana_are_refused_by_name(tmp_path, make, file, values, text):
    change(make(tmp_path / "model") / file, **values)
    with pytest.raises(ModelError, match=text) as caught:
        family(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("resolution", "middle"), [(32, 0.5), (64, 0.75)])
def test_flux_shifts_the_noise_by_the_resolution(tmp_path, resolution, middle):
    """`exp(mu) / (exp(mu) + 1 / s - 1)` at s = 1/2, `mu` linear in the number of tokens."""
    folder = tiny_flux_folder(tmp_path / "model")
    mu = math.log(middle / (1.0 - middle))
    tokens = {32: 64, 64: 256}  # of 4 pixels a side
    shifts = {"base_shift": 0.0, "base_image_seq_len": 64}
    shifts |= {"max_shift": math.log(3.0), "max_image_seq_len": 256}
    change(folder / "scheduler" / "scheduler_config.json", **shifts)
    model = ModelFolder(folder)
    assert model.family.tokens(model, resolution) == tokens[resolution]
    schedule = model.family.schedule(model, resolution)
    assert float(schedule.sigma[499]) == pytest.approx(middle, abs=1e-6)
    assert mu == pytest.approx(math.log(3.0) * (resolution == 64))
    assert torch.equal(schedule.timesteps, schedule.sigma)


def test_sana_trains_with_the_shift_of_its_solver(tmp_path):
    model = ModelFolder(tiny_sana_folder(tmp_path / "model"))
    schedule = model.family.schedule(model, 32)
    assert float(schedule.sigma[499]) == pytest.approx(0.75)  # 3 s / (1 + 2 s) at s = 1/2
    assert float(schedule.timesteps[499]) == pytest.approx(750.0)


def test_flux_is_told_the_guidance_scale_asked_for(tmp_path):
    model = ModelFolder(tiny_flux_folder(tmp_path / "model"))
    denoiser, generator = model.family.load_denoiser(model), torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 4, 4, generator=generator)
    conditions = {"prompt_embeds": torch.randn(1, 8, 32), "pooled": torch.randn(1, 16)}
    at = NoisedPair(latents, torch.tensor([500]), torch.tensor([0.5]), latents)
    with torch.no_grad():
        found = [
            model.family.predict(denoiser, replace(at, guidance=scale), conditions)
            for scale in (1.0, 3.5)
        ]
    assert not torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "part", "values", "text"),
    [
        (
            tiny_sd3_folder,
            "text_encoder_3",
            {"d_model": 64},
            r"text_encoder_3 give 64 numbers \(d_model\), the transformer reads 48",
        ),
        (
            tiny_sd3_folder,
            "text_encoder_2",
            {"projection_dim": 24},
            r"text_encoder and text_encoder_2 give 20 \+ 24 numbers .* reads 40",
        ),
        (
            tiny_flux_folder,
            "text_encoder",
            {"hidden_size": None},
            r"text_encoder give None numbers .* reads 16 \(pooled_projection_dim\)",
        ),
        (
            tiny_sana_folder,
            "text_encoder",
            {"hidden_size": 32},
            r"give 32 numbers \(hidden_size\), the transformer reads 16 \(caption_channels\)",
        ),
    ],
)
def test_text_encoders_of_another_model_are_refused(tmp_path, make, part, values, text):
    change(make(tmp_path / "model") / part / "config.json", **values)
    with pytest.raises(ModelError, match=text):
        family(tmp_path / "model")


@pytest.mark.parametrize(
    ("broken", "options", "text"),
    [
        ("scheduler", [], "sd3 is trained with flow matching"),
        (None, ["train.snr_gamma=5"], "train.snr_gamma: min-SNR"),
        (None, ["train.guidance=3.5"], "train.guidance: sd3 is told no guidance scale"),
        (None, ["train.max_timestep=2000"], "0 <= min < max <= 1000"),
        (None, ["prepare.clip_skip=1"], "prepare.clip_skip: sd3 has no such way"),
    ],
)
def test_prepare_says_it_in_one_line_and_leaves_with_2(
    own, tmp_path, capsys, broken, options, text
):
    if broken:
        change(own / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    write_folder(tmp_path / "data", 2, sizes=((32, 32),))
    raw = {
        "model": {"path": str(own)},
        "data": {"source": "folder", "path": str(tmp_path / "data")},
        "prepare": {"cache_dir": str(tmp_path / "cache"), "resolution": 32, "workers": 0},
        "train": {"output_dir": "u", "objective": {"name": "dpo"}, "max_steps": 1, "trackers": []},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    sets = [word for option in options for word in ("--set", option)]
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", str(path), *sets])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if text.split(" .*")[0] in line]
    assert len(said) == 1
    assert not list((tmp_path / "cache").glob("*/latents.safetensors"))
