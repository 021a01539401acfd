"""A checkpoint in one file trains, samples and is checked as the folder that it was made from."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from fastpo.cli import main
from fastpo.config import ModelConfig, load_config, parse_config
from fastpo.config.sections import PrepareConfig
from fastpo.data.cache.fingerprint import cache_fingerprint
from fastpo.errors import ModelError
from fastpo.models import single_file
from fastpo.models.folder import ModelFolder
from fastpo.plan.architecture import resolve_architecture
from fastpo.testing import write_single_file
from fastpo.testing.single_files import unet_names, vae_names
from fastpo.train.agreement import model_sample


@pytest.fixture(scope="module")
def files(tiny_pipelines, tmp_path_factory):
    """Both families as one file: `{"sdxl": file, "sd15": file}`."""
    folder = tmp_path_factory.mktemp("single")
    return {
        name: write_single_file(pipeline, folder / f"{name}.safetensors")
        for name, pipeline in tiny_pipelines.items()
    }


@pytest.fixture(scope="module")
def bare(tiny_pipelines, tmp_path_factory):
    """The pipelines without weights: what `model.config` needs."""
    folder = tmp_path_factory.mktemp("bare")
    ignore = shutil.ignore_patterns("*.safetensors")
    return {
        name: shutil.copytree(pipeline, folder / name, ignore=ignore)
        for name, pipeline in tiny_pipelines.items()
    }


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub must not be asked."""

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.DiffusionPipeline.download", asked)


def resolved(path, **options):
    return ModelFolder.resolve(ModelConfig(path=str(path), **options))


def same(one, two):
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_every_component_is_that_of_the_folder(files, bare, tiny_pipelines, family, tmp_path):
    single = resolved(files[family], config=str(bare[family]))
    whole = resolved(tiny_pipelines[family])
    assert single.family is whole.family
    assert same(single.family.load_denoiser(single), whole.family.load_denoiser(whole))
    config = PrepareConfig(cache_dir=tmp_path)
    one, two = (m.family.load_encoders(m, config, torch.device("cpu")) for m in (single, whole))
    assert same(one.vae, two.vae)
    assert all(map(same, one.text_encoders, two.text_encoders))
    one, two = (m.family.pipeline(m, torch.float32) for m in (single, whole))
    for name in ("unet", "vae", "text_encoder"):
        assert same(one.components[name], two.components[name])


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_the_real_sizes_fit_too(monkeypatch, tmp_path, family):
    """Names and shapes of SD1.5 and SDXL themselves, on the meta device."""
    packaged = Path(single_file.__file__).parent / "architectures" / family
    names = {
        "unet": (UNet2DConditionModel, "model.diffusion_model.", unet_names),
        "vae": (AutoencoderKL, "first_stage_model.", vae_names),
    }
    for name, (kind, prefix, turn) in names.items():
        (tmp_path / name).mkdir()
        shutil.copy(packaged / f"{name}.json", tmp_path / name / "config.json")
        with torch.device("meta"):
            weights = kind.from_config(kind.load_config(tmp_path, subfolder=name)).state_dict()
        turned = {prefix + key: tensor for key, tensor in turn(weights).items()}
        monkeypatch.setattr(single_file, "header", lambda file, turned=turned: turned)
        folder = ModelFolder(tmp_path)
        single_file.check_component(kind, folder, name, tmp_path)


@pytest.fixture
def single_config(files, bare, tiny_data, experiment, tmp_path):
    """The configuration of a run of the SD1.5 file."""
    settings = (
        f"model.path={files['sd15']}",
        f"model.config={bare['sd15']}",
        f"prepare.cache_dir={tmp_path / 'cache'}",
        "data.limit=2",
        "train.max_steps=1",
        "evaluate.num_inference_steps=1",
        "evaluate.seeds_per_prompt=1",
    )
    return experiment("sd15"), [word for text in settings for word in ("--set", text)]


def test_the_commands_run_from_one_file(single_config, tmp_path):
    path, settings = single_config
    assert resolve_architecture(load_config(path, settings[1::2])).family == "sd15"
    for command in ("prepare", "train", "evaluate"):
        with pytest.raises(SystemExit) as ended:
            main([command, str(path), *settings])
        assert ended.value.code in (0, None), command
    assert (tmp_path / "run" / "final" / "pytorch_lora_weights.safetensors").is_file()
    assert list((tmp_path / "run" / "evaluation" / "aligned").glob("*.png"))


def test_a_file_s_content_is_its_identity_and_not_its_name(files, bare, tmp_path):
    def fields(file):
        raw = {
            "model": {"path": str(file), "config": str(bare["sd15"])},
            "data": {"source": "folder", "path": str(tmp_path)},
            "prepare": {"cache_dir": "c", "resolution": 32},
            "train": {"output_dir": "o", "objective": {"name": "sft"}, "max_steps": 1},
        }
        (tmp_path / "pairs.jsonl").touch()
        config = parse_config(raw)
        model = ModelFolder.resolve(config.model)
        return cache_fingerprint(config, model).fields, model_sample(model)

    renamed = shutil.copy(files["sd15"], tmp_path / "renamed.safetensors")
    assert fields(renamed)[0] == fields(files["sd15"])[0]
    weights = load_file(renamed)
    name = "first_stage_model.encoder.conv_in.bias"
    save_file({**weights, name: weights[name] + 1}, renamed)
    changed, sample = fields(renamed)
    before, sample_before = fields(files["sd15"])
    assert changed["VAE"] != before["VAE"]
    assert sample != sample_before


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_in_one_file(files, tiny_pipelines, tmp_path, prefix):
    """As `vae-ft-mse-840000-ema-pruned.safetensors`: the names are without a prefix."""
    start = "first_stage_model."
    weights = {k: v + 1 for k, v in load_file(files["sdxl"]).items() if k.startswith(start)}
    file = tmp_path / "vae.safetensors"
    save_file({prefix + k.removeprefix(start): v for k, v in weights.items()}, file)
    model = resolved(tiny_pipelines["sdxl"], vae=str(file))
    vae = model.family.load_encoders(
        model, PrepareConfig(cache_dir=tmp_path), torch.device("cpu")
    ).vae
    own = resolved(tiny_pipelines["sdxl"])
    plain = own.family.pipeline(own, torch.float32).vae
    torch.testing.assert_close(vae.encoder.conv_in.bias, plain.encoder.conv_in.bias + 1)
    assert same(model.family.pipeline(model, torch.float32).vae, vae)
    assert model.digest("vae") != own.digest("vae")


def test_a_vae_of_diffusers_names_in_one_file(tiny_pipelines, tmp_path):
    [stored] = (tiny_pipelines["sdxl"] / "vae").glob("*.safetensors")
    model = resolved(
        tiny_pipelines["sdxl"], vae=str(shutil.copy(stored, tmp_path / "own.safetensors"))
    )
    own = resolved(tiny_pipelines["sdxl"])
    one, two = (m.family.pipeline(m, torch.float32).vae for m in (model, own))
    assert same(one, two)


def refusal(path, **options):
    with pytest.raises(ModelError) as error:
        model = resolved(path, **options)
        assert model.family
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_a_config_the_usual_one_is_named(files):
    told = refusal(files["sd15"])
    assert "holds weights alone; set model.config to the diffusers folder" in told
    assert "(by its names stable-diffusion-v1-5/stable-diffusion-v1-5)" in told


def test_a_config_of_another_architecture_is_refused_before_anything_is_encoded(files, bare):
    told = refusal(files["sdxl"], config=str(bare["sd15"]))
    assert "does not fit unet/config.json in model.config: under diffusers' names it" in told
    assert "has in another shape" in told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vae", "holds no vae, and .*vae of model.config has no weights either; set model.vae"),
        ("text_encoder", "holds no text_encoder, and"),
        ("unet", "holds a VAE alone, which model.vae takes"),
    ],
)
def test_a_part_that_is_not_in_the_file_is_named(tiny_pipelines, bare, tmp_path, name, told):
    file = write_single_file(tiny_pipelines["sd15"], tmp_path / "part.safetensors", without=(name,))
    assert re.search(told, refusal(file, config=str(bare["sd15"])))


def test_a_part_that_the_config_s_folder_has_is_taken_from_there(tiny_pipelines, tmp_path):
    file = write_single_file(
        tiny_pipelines["sd15"], tmp_path / "part.safetensors", without=("vae",)
    )
    model = resolved(file, config=str(tiny_pipelines["sd15"]))
    assert model.weights_file("vae") is None
    assert model.family.pipeline(model, torch.float32).vae is not None
    assert model.digest("vae") == resolved(tiny_pipelines["sd15"]).digest("vae")


def test_missing_keys_and_other_files_are_named(files, bare, tmp_path):
    file = tmp_path / "own.safetensors"
    weights = load_file(files["sd15"])
    gone = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    save_file({k: v for k, v in weights.items() if k != gone}, file)
    config = str(bare["sd15"])
    assert "lacks 1 key (down_blocks.0.resnets.0.conv1.weight)" in refusal(file, config=config)
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(1)}, file)
    assert "holds adapters (LoRA), and no model" in refusal(file, config=config)
    save_file({"own": torch.zeros(1)}, file)
    assert "holds no UNet named as in A1111's and ComfyUI's" in refusal(file, config=config)
    file.write_bytes(file.read_bytes()[:-1])
    assert "is cut off or no safetensors file" in refusal(file, config=config)
    other = tmp_path / "own.ckpt"
    other.touch()
    assert "or a checkpoint in one .safetensors file" in refusal(other, config=config)


def test_a_model_that_says_it_predicts_the_velocity(files, bare, tmp_path):
    file, config = tmp_path / "v.safetensors", shutil.copytree(bare["sdxl"], tmp_path / "config")
    save_file({**load_file(files["sdxl"]), "v_pred": torch.tensor([])}, file)
    assert "by its key v_pred that it predicts the velocity" in refusal(file, config=str(config))
    path = config / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text()) | {"prediction_type": "v_prediction"}
    path.write_text(json.dumps(settings))
    assert resolved(file, config=str(config)).family.name == "sdxl"


def test_a_config_for_a_folder_is_refused(tiny_pipelines, bare):
    told = refusal(tiny_pipelines["sd15"], config=str(bare["sd15"]))
    assert "model.config is for a model in one file" in told


def test_files_that_exist_are_never_asked_for_at_the_hub(files, bare, tiny_pipelines, monkeypatch):
    """`models/own.safetensors` would do for a hub id."""
    monkeypatch.chdir(files["sd15"].parent.parent)
    relative = f"{files['sd15'].parent.name}/{files['sd15'].name}"
    assert resolved(relative, config=str(bare["sd15"])).family.name == "sd15"
    told = refusal(tiny_pipelines["sd15"], vae=relative.replace("sd15.", "none.") + "/no/where")
    assert "no such folder" in told
