"""Starts from an earlier run's weights, and the adapters that peft gives beside plain LoRA."""

import json
import shutil

import pytest
import torch
import yaml
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fastpo.config import load_config
from fastpo.data.cache import PairCache
from fastpo.errors import ConfigError, ModelError
from fastpo.evaluate.sampling import ImageSampler
from fastpo.models.denoisers import add_lora
from fastpo.models.folder import ModelFolder
from fastpo.models.lora_start import start_from_lora
from fastpo.noise import setup_noise
from fastpo.plan.architecture import resolve_architecture
from fastpo.reference_cache.fingerprint import reference_identity
from fastpo.train import Observer, train
from fastpo.train.consolidate import export_lora
from tests.conftest import raw_config, read_metrics

LORA = "pytorch_lora_weights.safetensors"
ADAPTERS = ("train.lora.rank=4", "train.lora.alpha=6", "train.optim.lr=1e-1", "train.max_steps=2")


@pytest.fixture(scope="module")
def settings(tiny_data, light_pipelines, tiny_caches, tmp_path_factory):
    """`settings("run", "train.max_steps=6", ...)`: a small run."""
    base = tmp_path_factory.mktemp("warm")
    raw = raw_config("sd15", light_pipelines["sd15"], tiny_data, tiny_caches)
    path = base / "run.yaml"
    path.write_text(yaml.safe_dump(raw))

    def make(name, *overrides):
        return load_config(path, [f"train.output_dir={base / name}", *overrides])

    return make


@pytest.fixture(scope="module")
def first(settings):
    """A run of two steps that trained adapters of rank 4 and alpha 6."""
    return train(settings("first", *ADAPTERS), progress=False)


@pytest.fixture(scope="module")
def adapted(settings):
    """`adapted("train.lora.rank=4", ...)`: family and denoiser with fresh adapters."""

    def make(*overrides):
        config = settings("-", *overrides)
        model = ModelFolder.resolve(config.model)
        denoiser = model.family.load_denoiser(model)
        add_lora(model.family, denoiser, config.train.lora)
        return model.family, denoiser

    return make


def layers(denoiser):
    return {k: v.clone() for k, v in get_peft_model_state_dict(denoiser).items()}


def test_training_goes_on_from_an_earlier_lora_and_the_reference_is_the_base(settings, first):
    start = (*ADAPTERS[:2], f"model.lora={first / 'final'}", "train.optim.lr=1e-12")
    folder = train(settings("second", *start, "train.max_steps=1"), progress=False)
    one, two = (load_file(run / "final" / LORA) for run in (first, folder))
    assert all(torch.allclose(one[k], two[k], atol=1e-9) for k in one)
    assert any(one[k].abs().max() > 1e-3 for k in one if "up" in k)
    assert abs(read_metrics(folder)[0]["rewards/margins"]) > 1e-6  # as far from the base as before


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui", "peft"])
def test_files_of_other_programs_are_read(first, adapted, tmp_path, form):
    family, denoiser = adapted(*ADAPTERS)
    start_from_lora(family, denoiser, first / "final")
    expected = layers(denoiser)
    if form == "peft":
        file = tmp_path / "adapter_model.safetensors"
        save_file({f"base_model.model.{k}": v for k, v in expected.items()}, file)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6}))
        source = tmp_path
    else:
        source = export_lora(first, tmp_path / "lora.safetensors", form)
    family, other = adapted(*ADAPTERS)
    assert any(not torch.equal(v, expected[k]) for k, v in layers(other).items())
    start_from_lora(family, other, source)
    assert all(torch.equal(v, expected[k]) for k, v in layers(other).items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.lora.rank=8", r"set train\.lora\.rank to 4"),
        ("train.lora.alpha=4", r"by 1.5 \(alpha 6 at rank 4\).*set train\.lora\.alpha to 6"),
        ("train.lora.target_modules=[to_q]", r"also holds .*set train\.lora\.target_modules"),
        ("train.lora.use_dora=true", r"does not hold .*lora_magnitude_vector"),
    ],
)
def test_adapters_of_another_kind_are_refused(first, adapted, change, told):
    family, denoiser = adapted(*ADAPTERS, change)
    with pytest.raises(ConfigError, match=told):
        start_from_lora(family, denoiser, first / "final")


def test_what_is_no_lora_is_refused(settings, adapted, tmp_path):
    family, denoiser = adapted()
    with pytest.raises(ConfigError, match=r"holds no LoRA: expected .*no such file"):
        start_from_lora(family, denoiser, tmp_path / "gone")
    (tmp_path / "x.safetensors").write_bytes(b"text")
    with pytest.raises(ModelError, match=r"x\.safetensors could not be read"):
        start_from_lora(family, denoiser, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"model\.lora is continued by train\.method: lora"):
        settings("-", f"model.lora={tmp_path}", "train.method=full")


def test_a_full_run_is_the_base_of_the_next(settings):
    full = ("train.method=full", "train.optim.lr=1e-3", "train.max_steps=1")
    earlier = settings("full", *full)
    final = train(earlier, progress=False) / "final"
    config = settings("next", f"model.path={final}", "train.max_steps=1")
    base, model = (ModelFolder.resolve(c.model) for c in (earlier, config))
    assert model.component("unet") == final / "unet"
    assert model.component("text_encoder") == base.component("text_encoder")
    assert model.digest("unet").sha256 != base.digest("unet").sha256
    cache = PairCache.open(config)  # that of the base: VAE and text encoder are the same
    identities = [
        reference_identity(c, m, cache, setup_noise(c, m))
        for c, m in ((earlier, base), (config, model))
    ]
    assert identities[0] != identities[1]
    trained = load_file(final / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = model.family.load_denoiser(model).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in trained.items())
    sampled = ImageSampler(config, progress=False).pipeline.unet.state_dict()
    assert all(torch.equal(sampled[k], v) for k, v in trained.items())
    assert resolve_architecture(config).unet["in_channels"] == 4
    assert (train(config, progress=False) / "final" / LORA).is_file()


def test_an_export_that_cannot_be_a_base_says_what_to_write(settings, first, tmp_path):
    with pytest.raises(ModelError, match=r"holds a LoRA, no model: set model\.path to .*sd15, and"):
        ModelFolder.resolve(settings("-", f"model.path={first / 'final'}").model)
    shutil.copytree(ModelFolder.resolve(settings("-").model).component("unet"), tmp_path / "unet")
    with pytest.raises(ModelError, match=r"no config\.yaml of a run lies beside it"):
        ModelFolder.resolve(settings("-", f"model.path={tmp_path}").model)


KINDS = {
    "dora": ["use_dora=true"],
    "rslora": ["use_rslora=true"],
    "patterns": ["rank_pattern={to_k: 2}", "alpha_pattern={to_k: 5}"],
}


class Trained(Observer):
    """Keeps the policy, and ends the run after a step."""

    def __init__(self, last=None):
        self.last = last

    def on_start(self, trainer, start):
        self.policy = trainer.denoisers.policy

    def on_step(self, step, table, metrics):
        if step == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_train_resume_and_load_in_diffusers(settings, kind, tmp_path):
    options = [*ADAPTERS, *(f"train.lora.{key}" for key in KINDS[kind]), "train.checkpoint_every=1"]
    ema = "train.objective={name: adaptive_dpo, beta: 500.0}", "train.annotators={kind: ema}"
    options += ["train.max_steps=3", *ema]
    seen = Trained()
    folder = train(settings(kind, *options), progress=False, observers=[seen])
    broken = settings(f"{kind}-resumed", *options)
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=False, observers=[Trained(2)])
    train(broken, resume=True, progress=False)
    assert read_metrics(broken.train.output_dir) == read_metrics(folder)
    x, text = torch.randn(2, 4, 4, 4), torch.randn(2, 7, seen.policy.config["cross_attention_dim"])
    sampler = ImageSampler(settings(kind, *options), progress=False)
    with torch.no_grad(), sampler._aligned(folder / "final") as pipeline:
        one, two = (unet.eval()(x, 500, text).sample for unet in (seen.policy, pipeline.unet))
    plain = sampler.pipeline.unet(x, 500, text).sample
    assert (two - plain).abs().max() > 1e-3
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    if kind == "dora":
        with pytest.raises(ModelError, match=r"plain LoRA; this run trained DoRA"):
            export_lora(folder, tmp_path / "l.safetensors", "kohya")
        return
    tensors = load_file(export_lora(folder, tmp_path / "l.safetensors", "comfyui"))
    for name, module in seen.policy.named_modules():
        if hasattr(module, "scaling"):
            flat = f"lora_unet_{name.replace('.', '_')}"
            rank = tensors[f"{flat}.lora_down.weight"].shape[0]
            assert float(tensors[f"{flat}.alpha"]) / rank == pytest.approx(
                module.scaling["default"]
            )


def test_dora_and_one_pass_for_all_annotators_are_refused(settings):
    with pytest.raises(
        ConfigError, match=r"batched: true does not work with train\.lora\.use_dora"
    ):
        settings(
            "-",
            "train.lora.use_dora=true",
            "train.objective={name: adaptive_dpo, beta: 500.0}",
            "train.annotators={kind: ema, batched: true}",
        )
