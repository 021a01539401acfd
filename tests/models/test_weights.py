"""Weights are loaded whole or refused: file and keys are named, and why the names differ."""

import logging
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpo.cli import main
from fastpo.config import ModelConfig, load_config
from fastpo.config.sections import PrepareConfig
from fastpo.errors import ModelError
from fastpo.evaluate.sampling import ImageSampler, plan_samples
from fastpo.models.folder import ModelFolder
from fastpo.models.weights import complain

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"


@pytest.fixture
def own(tiny_pipelines, tmp_path):
    return shutil.copytree(tiny_pipelines["sdxl"], tmp_path / "model")


def told_by(*names):
    """The records of some loggers, and how to stop collecting them."""
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(handler)
    return records, lambda: [logger.removeHandler(handler) for logger in loggers]


@pytest.fixture
def told():
    """What the libraries tell of keys."""
    records, stop = told_by("transformers.modeling_utils", "diffusers.models.modeling_utils")
    yield records
    stop()


def load(folder, part):
    """What `train` loads of the UNet, and `prepare` of the others."""
    model = ModelFolder.resolve(ModelConfig(path=str(folder)))
    if part == "unet":
        return model.family.load_denoiser(model)
    config = PrepareConfig(cache_dir=folder / "unused")
    return model.family.load_encoders(model, config, torch.device("cpu"))


def sample(folder):
    """What `evaluate` loads."""
    model = ModelFolder.resolve(ModelConfig(path=str(folder)))
    return model.family.pipeline(model, torch.float32)


def weights_of(part):
    [file] = part.glob("*.safetensors")
    return file


def rewrite(part, change):
    file = weights_of(part)
    weights = {k: v.contiguous() for k, v in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return file


def prefixed(prefix):
    return lambda weights: {f"{prefix}{key}": value for key, value in weights.items()}


def first_matrix(weights):
    return next(key for key, value in weights.items() if value.ndim == 2)


def without_one(weights):
    gone = first_matrix(weights)
    return {key: value for key, value in weights.items() if key != gone}


def of_peft(weights):
    """`to_q.weight` becomes `to_q.base_layer.weight`, as in a PEFT model's own state."""
    return {re.sub(r"(to_q|q_proj)\.", r"\1.base_layer.", k): v for k, v in weights.items()}


CHANGES = {
    "compiled": (prefixed("_orig_mod."), r"carry '_orig_mod\.', they are of a compiled model"),
    "wrapped": (prefixed("module."), r"carry 'module\.', they are of a model wrapped by DDP"),
    "peft": (of_peft, r"lacks .* keys \(.*base_layer.*carry 'base_layer\.', .* merge its adapters"),
    "whole peft": (prefixed("base_model.model."), r"carry 'base_model\.model\.', .* PEFT model"),
    "other prefix": (prefixed("inner."), r"the names carry 'inner\.' in front"),
    "missing": (without_one, r"lacks 1 key \([\w.]+\)$"),
    "unexpected": (lambda w: {**w, "own.bias": torch.zeros(1)}, r"unexpected 1 key \(own\.bias\)$"),
    "shape": (
        lambda w: {**w, first_matrix(w): torch.zeros(3, 5)},
        r"has in another shape 1 key \([\w.]+ \[3, 5\] instead of \[\d+, \d+\]\)$",
    ),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("change", "complaint"), CHANGES.values(), ids=CHANGES)
def test_keys_that_do_not_match_are_refused(own, told, part, change, complaint):
    file = rewrite(own / part, change)
    with pytest.raises(ModelError, match=complaint) as refusal:
        load(own, part)
    assert f"{part}/{file.name} " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not told, "the error says it all"


@pytest.mark.parametrize("part", PARTS)
def test_images_are_made_with_whole_weights_too(own, part):
    rewrite(own / part, prefixed("module."))
    with pytest.raises(ModelError, match=rf"{part} could not be loaded: .*carry 'module\.'"):
        sample(own)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda content: content[:-7], "is cut off or no safetensors file"),
        (lambda content: b"", "is cut off or no safetensors file"),
        (lambda content: POINTER.encode(), "is a Git LFS pointer.*`git lfs pull`"),
    ],
)
def test_files_that_hold_no_weights_are_refused(own, part, damage, complaint):
    file = weights_of(own / part)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=rf"{part}/{file.name} {complaint}") as refusal:
        load(own, part)
    assert "\n" not in str(refusal.value)


def test_keys_that_the_libraries_ignore_by_design_are_no_mistake(own):
    """Older versions of transformers saved the positions' numbers."""
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(own / "text_encoder", lambda weights: {**weights, **positions})
    assert load(own, "text_encoder")


def test_many_keys_are_counted_and_some_are_named():
    told = complain({f"k{i}.weight" for i in range(9)}, (), ())
    assert told == "lacks 9 keys (k0.weight, k1.weight, k2.weight, ...)"
    assert complain((), (), ()) is None


def test_an_exported_denoiser_whose_keys_do_not_match_is_refused(own, experiment, tmp_path):
    shutil.copytree(own / "unet", tmp_path / "final" / "unet")
    rewrite(tmp_path / "final" / "unet", prefixed("module."))
    sampler = ImageSampler(load_config(experiment("sdxl")), progress=False)
    samples = plan_samples(sampler.config)
    with pytest.raises(ModelError, match=r"final/unet could not be loaded: .*carry 'module\.'"):
        sampler.fill(tmp_path / "images", samples, label="aligned", aligned=tmp_path / "final")
    assert not (tmp_path / "images").exists()


def test_a_command_s_start_hides_one_warning_alone(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    records, stop = told_by(name := "transformers.utils.import_utils")
    logging.getLogger(name).warning("`CLIPImageProcessor` requires torchvision (not installed)")
    logging.getLogger(name).warning("something of use")
    stop()
    assert records == ["something of use"]
