"""A command looks for its model once: one question to the hub, one snapshot for all it reads."""

import json
import shutil

import pytest
import yaml

from fastpo.cli import main
from fastpo.config import load_config, parse_config
from fastpo.data.cache.manifest import load_manifest
from fastpo.models.folder import ModelFolder, component_digest
from fastpo.testing import tiny_sdxl_folder, write_folder


@pytest.fixture
def hub(tmp_path, tiny_pipelines, monkeypatch):
    """The hub's answers to `owner/model`: first the tiny weights, later others."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    newer = tiny_sdxl_folder(tmp_path / "newer", seed=1)
    answers = []

    def download(name, **options):
        assert (name, options["revision"], options["variant"]) == ("owner/model", "main", None)
        answers.append(newer if answers else tiny_pipelines["sdxl"])
        return str(answers[-1])

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    return answers


@pytest.fixture
def experiment_on_the_hub(tmp_path):
    write_folder(tmp_path / "data", 3)
    raw = {
        "model": {"path": "owner/model", "revision": "main"},
        "data": {"source": "folder", "path": str(tmp_path / "data")},
        "prepare": {"cache_dir": str(tmp_path / "cache"), "resolution": 32},
        "train": {
            "output_dir": str(tmp_path / "run"),
            "objective": {"name": "dpo", "beta": 500.0},
            "reference": "cached",
            "micro_batch_size": 1,
            "trackers": [],
            "max_steps": 2,
            "precision": "fp32",
        },
        "evaluate": {"prompts": ["a cat"], "num_inference_steps": 1, "precision": "fp32"},
    }
    parse_config(raw)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(hub, *arguments):
    """Runs a command as on another day; returns how often it asked the hub."""
    hub.clear()
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert ended.value.code in (0, None)
    return len(hub)


def test_every_command_asks_the_hub_once(hub, experiment_on_the_hub, tiny_pipelines, tmp_path):
    path = experiment_on_the_hub
    assert run(hub, "prepare", path, "--reference", "2") == 1
    assert run(hub, "train", path) == 1
    assert run(hub, "evaluate", path) == 1
    assert run(hub, "consolidate", tmp_path / "run", tmp_path / "out") == 1
    # Everything above is of the first snapshot: identity, latents, reference, base of the adapters.
    manifest = load_manifest(tmp_path / "cache")
    for name, component in {"VAE": "vae", "text_encoder_2": "text_encoder_2"}.items():
        digest = component_digest(tiny_pipelines["sdxl"] / component, None)
        assert manifest.weights[name] == digest
    unet = json.loads((tmp_path / "cache" / "reference" / "unet.json").read_text())
    assert unet["sha256"] == component_digest(tiny_pipelines["sdxl"] / "unet", None).sha256
    assert list((tmp_path / "run" / "evaluation" / "base").glob("*.png"))


def test_one_snapshot_gives_fingerprint_and_weights(hub, experiment_on_the_hub, tiny_pipelines):
    """A `ModelFolder` made before a push knows nothing of the push."""
    model = ModelFolder.resolve(load_config(experiment_on_the_hub).model)
    shown = ModelFolder.resolve(load_config(experiment_on_the_hub).model)
    assert len(hub) == 2 and model.path != shown.path
    assert model.digest("unet") == component_digest(tiny_pipelines["sdxl"] / "unet", None)
    assert model.digest("unet") != shown.digest("unet")
    assert model.vae.parent == model.path


def test_a_component_is_hashed_once(tmp_path, tiny_pipelines, monkeypatch):
    from fastpo.models import folder as module

    folder = tmp_path / "copy"
    shutil.copytree(tiny_pipelines["sd15"], folder)
    hashed, digest = [], module.digest_files
    monkeypatch.setattr(module, "digest_files", lambda f: (hashed.append(f), digest(f))[1])
    model = ModelFolder(folder)
    first = model.digest("vae")
    assert model.digest("vae") is first
    assert ModelFolder(folder).digest("vae", first) is first, "its files are untouched"
    assert len(hashed) == 1
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert ModelFolder(folder).digest("vae", first) != first
    assert len(hashed) == 2
