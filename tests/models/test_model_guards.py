"""A model's folder is data: no code of it runs, and wrong files are refused in one line."""

import json
import pickle
import re
import shutil

import pytest
import torch

from fastpo.cli import main
from fastpo.config import ModelConfig
from fastpo.errors import ModelError
from fastpo.models import folder as module
from fastpo.models.folder import ModelFolder


@pytest.fixture
def own(tiny_pipelines, tmp_path):
    return shutil.copytree(tiny_pipelines["sd15"], tmp_path / "model")


def resolved(folder):
    return ModelFolder.resolve(ModelConfig(path=str(folder)))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CODE = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\nclass Own: pass\n"


@pytest.mark.parametrize("library", ["own", "collections", "os.path"])
def test_libraries_that_an_index_names_are_not_imported(own, library):
    (own / "unet" / "own.py").write_text(CODE)
    (own / "own.py").write_text(CODE)
    change(own / "model_index.json", unet=[library, "Own"])
    with pytest.raises(ModelError, match=r"model_index\.json: unet is .* no code of a model's own"):
        resolved(own)
    assert not list(own.rglob("*.ran"))


def test_a_pipeline_of_a_model_s_own_is_refused(own):
    (own / "own.py").write_text(CODE)
    change(own / "model_index.json", _class_name=["own", "Own"])
    with pytest.raises(ModelError, match="_class_name must be the name of one of diffusers'"):
        resolved(own)
    assert not list(own.rglob("*.ran"))


def test_code_beside_the_weights_is_ignored(own):
    for name in ("pipeline.py", "unet/unet_2d_condition.py", "text_encoder/modeling.py"):
        (own / name).write_text(CODE)
    auto = {"AutoModel": "modeling.Own", "AutoConfig": "modeling.Own"}
    change(own / "text_encoder" / "config.json", auto_map=auto)
    change(own / "unet" / "config.json", auto_map=auto)
    model = resolved(own)
    model.family.load_denoiser(model)
    model.family.pipeline(model, torch.float32)
    assert not list(own.rglob("*.ran"))


def test_weights_that_are_pickled_objects_are_not_run(own):
    class Touch:
        def __reduce__(self):
            return (type(own).touch, (own / "ran",))

    (own / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (own / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    model = resolved(own)
    with pytest.raises(ModelError, match="holds no UNet that diffusers loads"):
        model.family.load_denoiser(model)
    assert not (own / "ran").exists()


def test_json_is_bounded_and_its_values_are_looked_at(own, monkeypatch):
    model = resolved(own)
    change(own / "vae" / "config.json", block_out_channels="many")
    with pytest.raises(ModelError, match="block_out_channels of the VAE must be a list"):
        model.family.geometry(model, 32, buckets=True)
    change(own / "vae" / "config.json", scaling_factor="x")
    with pytest.raises(ModelError, match="the VAE's scaling_factor must be a number, got 'x'"):
        model.family.schedule(model, 32)
    change(own / "scheduler" / "scheduler_config.json", beta_start="x")
    with pytest.raises(ModelError, match=r"scheduler_config\.json: no schedule could be made"):
        model.family.schedule(model, 32)
    monkeypatch.setattr(module, "MOST_JSON_BYTES", 50)
    with pytest.raises(ModelError, match="at most 50 are read"):
        resolved(own)


def test_damaged_weights_are_refused_in_one_line(own):
    weights = own / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-5], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        model = resolved(own)
        with pytest.raises(ModelError, match="holds no UNet that diffusers loads") as refusal:
            model.family.load_denoiser(model)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "file", "values", "complaint"),
    [
        *(
            ("scheduler", "scheduler_config.json", {"_class_name": name}, f"{name}.* DDPM's noise")
            for name in (
                "FlowMatchEulerDiscreteScheduler",
                "EDMEulerScheduler",
                "EDMDPMSolverMultistepScheduler",
                "CMStochasticIterativeScheduler",
                "LCMScheduler",
            )
        ),
        ("scheduler", "scheduler_config.json", {"use_flow_sigmas": True}, "with use_flow_sigmas"),
        ("vae", "config.json", {"_class_name": "AutoencoderTiny"}, "got 'AutoencoderTiny' of 4"),
        ("vae", "config.json", {"latent_channels": 16}, "got 'AutoencoderKL' of 16"),
        ("unet", "config.json", {"time_cond_proj_dim": 256}, "its time_cond_proj_dim is 256"),
        ("", "model_index.json", {"_class_name": "KolorsPipeline"}, "index.json names 'KolorsPipe"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "prepare", "train", "evaluate"])
def test_every_command_refuses_a_model_of_another_kind(
    own, experiment, capsys, command, part, file, values, complaint
):
    """The experiment's cache is of the unchanged model: only `train` could get any further."""
    change(own / part / file, **values)
    with pytest.raises(SystemExit) as ended:
        main([command, str(experiment("sd15")), "--set", f"model.path={own}"])
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert told.count("error:") == 1
    assert re.search(complaint, told)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"latents_mean": [0.0], "latents_std": [1.0] * 4}, r"for each channel, got \[0\.0\]"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "must be positive"),
    ],
)
def test_a_normalization_that_means_nothing_is_refused(tiny_pipelines, tmp_path, values, complaint):
    folder = shutil.copytree(tiny_pipelines["sdxl"], tmp_path / "sdxl")
    change(folder / "vae" / "config.json", **values)
    with pytest.raises(ModelError, match=complaint):
        assert resolved(folder).family
