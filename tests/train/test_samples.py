"""Images while a run trains: of the policy as it is, and without a trace in what is trained."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastpo.config import load_config
from fastpo.errors import ConfigError
from fastpo.evaluate.sampling import ImageSampler, plan_samples
from fastpo.report import write_report
from fastpo.train import train
from tests.conftest import raw_config

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def settings(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """`settings("run", "train.max_steps=6", ...)`: a small run with sample images."""
    base = tmp_path_factory.mktemp("samples")
    raw = raw_config("sdxl", light_pipelines["sdxl"], tiny_data, tiny_caches)
    raw["train"] |= {"max_steps": 3, "lora": {"dropout": 0.2}, "optim": {"lr": 1e-1}}
    path = base / "run.yaml"
    path.write_text(yaml.safe_dump(raw))

    def make(name, *overrides):
        return load_config(path, [f"train.output_dir={base / name}", *overrides])

    return make


@pytest.fixture(scope="module")
def sampled(settings):
    """A run that sampled after two steps and at its end, with its configuration."""
    options = ("train.sample_every=2", "train.trackers=[tensorboard]")
    config = settings("sampled", *options)
    return config, train(config, progress=False)


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_base_and_policy_are_sampled_at_the_asked_steps(sampled):
    config, folder = sampled
    names = {p.name for p in (folder / "samples").iterdir() if not p.name.startswith(".")}
    assert names == {"base", "step-00000002", "step-00000003"}
    about = json.loads((folder / "samples/step-00000002/set.json").read_text())
    assert [s["prompt"] for s in about["samples"]] == list(config.evaluate.prompts)
    for sample in about["samples"]:
        files = [folder / "samples" / name / sample["file"] for name in sorted(names)]
        base, second, third = map(pixels, files)
        assert base.shape == (32, 32, 3)
        assert np.abs(base - third).max() > 0
        assert np.abs(second - third).max() > 0


def test_the_last_images_are_those_of_the_exported_weights(sampled, tmp_path):
    """Dropout of the adapters is at work in neither: diffusers makes them in training mode."""
    config, folder = sampled
    evaluate = config.evaluate.model_copy(update={"seeds_per_prompt": 1})
    config = config.model_copy(update={"evaluate": evaluate})
    with safe_open(folder / "final" / LORA, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_dropout"] == 0.0
    samples = plan_samples(config)
    sampler = ImageSampler(config, progress=False)
    sampler.fill(tmp_path / "aligned", samples, label="-", aligned=folder / "final")
    for sample in samples:
        one = pixels(folder / "samples/step-00000003" / sample.file)
        assert np.abs(one - pixels(tmp_path / "aligned" / sample.file)).max() <= 1


def test_sampling_leaves_no_trace_in_the_weights(settings, sampled):
    plain = train(settings("plain"), progress=False)
    one, two = (load_file(folder / "final" / LORA) for folder in (plain, sampled[1]))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_trackers_and_the_page_show_them(sampled, tmp_path):
    folder = sampled[1]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    for file in (folder / "tensorboard").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"images": 0})
        events.Reload()
        if events.Tags()["images"]:
            break
    images = [i for tag in events.Tags()["images"] for i in events.Images(tag)]
    assert {(i.step, i.width, i.height) for i in images} == {(2, 128, 32), (3, 128, 32)}
    page = write_report([folder], tmp_path / "page", title="t").read_text()
    section = page.partition('<section id="samples">')[2].partition("</section>")[0]
    assert [name in section for name in ("base", "step 2", "step 3")] == [True] * 3
    assert section.count("data:image/png") == 6


def test_nothing_to_sample_is_told_before_anything_is_replaced(settings, sampled):
    folder = sampled[1]
    config = settings("sampled", "train.sample_every=2", "evaluate.prompts=[]")
    with pytest.raises(ConfigError, match=r"train\.sample_every: nothing to sample"):
        train(config, progress=False, overwrite=True)
    assert (folder / "final" / LORA).is_file()


def test_zero_3_is_refused(settings):
    with pytest.raises(ConfigError, match=r"sample_every does not work with ZeRO-3"):
        settings("-", "train.sample_every=2", "train.deepspeed=zero3")


def test_own_prompts_and_full_fine_tuning_in_half_precision(settings):
    options = ("train.sample_prompts=[a blue cat]", "train.sample_every=5", "train.lora={}")
    full = ("train.method=full", "train.precision=bf16", "train.optim.lr=1e-3")
    folder = train(settings("full", *options, *full), progress=False)
    files = sorted(p.relative_to(folder / "samples") for p in folder.glob("samples/*/*.png"))
    assert [str(f) for f in files] == ["base/00000-0.png", "step-00000003/00000-0.png"]
    one, two = (pixels(folder / "samples" / f) for f in files)
    assert 0 < np.abs(one - two).max()
