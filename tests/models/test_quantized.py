"""Adapters on a base in 4 or 8 bits: what a layer computes, and whole runs."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastpo.config import parse_config
from fastpo.data.prepare import prepare
from fastpo.errors import CacheError, ConfigError
from fastpo.models.denoisers import setup_denoisers
from fastpo.models.folder import ModelFolder
from fastpo.models.quantized import QuantizedLinear, quantizable, quantized_bytes
from fastpo.reference_cache import prepare_reference
from fastpo.testing import tiny_sd15_folder, write_folder
from fastpo.testing.language_pipelines import tiny_z_image_folder
from fastpo.train import train

CPU = torch.device("cpu")
BITS = ("4bit", "8bit")


def layer_of(bits, bias=True, sizes=(96, 40), dtype=torch.float32):
    plain = nn.Linear(*sizes, bias=bias)
    with torch.no_grad():
        plain.weight.copy_(
            torch.randn(sizes[1], sizes[0], generator=torch.Generator().manual_seed(0))
        )
    return plain, QuantizedLinear(plain.to(dtype), bits, CPU)


@pytest.mark.parametrize(("bits", "error"), [("4bit", 0.12), ("8bit", 0.01)])
@pytest.mark.parametrize("sizes", [(96, 40), (64, 40), (50, 7), (33, 5), (128, 64)])
def test_the_codes_stand_for_weights_near_the_layers_own(bits, error, sizes):
    """Also where blocks of 64 cross the ends of rows, or the last one is short."""
    plain, layer = layer_of(bits, sizes=sizes)
    difference = (layer.dense(torch.float32) - plain.weight).norm() / plain.weight.norm()
    assert 0.0 < difference < error


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_those_of_the_weights_that_the_codes_stand_for(bits, bias):
    _, layer = layer_of(bits, bias)
    x = torch.randn(3, 5, 96, requires_grad=True)
    upstream = torch.randn(3, 5, 40)
    found = layer(x)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    weight = layer.dense(torch.float32)
    expected = x @ weight.T + (layer.bias if bias else 0.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, upstream @ weight)
    with torch.no_grad():
        assert torch.equal(layer(x), found), "with and without a gradient, to the bit"
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("bits", BITS)
def test_autocast_sets_the_precision_of_a_layer(bits):
    _, layer = layer_of(bits, dtype=torch.bfloat16)
    x = torch.randn(2, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(("bits", "most"), [("4bit", 4.2), ("8bit", 8.1)])
def test_bytes_are_counted_as_they_are_held(bits, most):
    plain, layer = layer_of(bits, bias=False, sizes=(512, 256))
    held = layer.weight.nbytes
    if bits == "8bit":
        held += layer.scales.nbytes
    else:
        state = layer.state
        nested = state.state2
        tensors = (state.absmax, state.code, nested.absmax, nested.code, state.offset)
        held += sum(tensor.nbytes for tensor in tensors)
    assert quantized_bytes(plain, bits) == held
    if bits == "8bit":
        assert 8 * held / plain.weight.numel() < most
    large = nn.Linear(4096, 4096, device="meta")
    assert 8 * quantized_bytes(large, bits) / large.weight.numel() < most


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`config(name, ...)` of a run on a tiny Z-Image over one cache."""
    root = tmp_path_factory.mktemp("quantized")
    tiny_z_image_folder(root / "model")
    write_folder(root / "data", 4, sizes=((24, 24),))

    def config(name, **options):
        raw = {
            "seed": 3,
            "model": {"path": str(root / "model")},
            "data": {"source": "folder", "path": str(root / "data")},
            "prepare": {
                "cache_dir": str(root / "cache"),
                "resolution": 16,
                "text_length": 64,
                "store_precision": "fp32",
                "workers": 0,
            },
            "train": {
                "output_dir": str(root / name),
                "objective": {"name": "dpo", "beta": 20.0},
                "max_steps": 4,
                "micro_batch_size": 2,
                "precision": "fp32",
                "checkpoint_every": 2,
                "optim": {"lr": 1e-2, "schedule": "constant"},
                "gradient_checkpointing": True,
                "quantize_base": "4bit",
                "trackers": [],
            }
            | options,
        }
        return parse_config(raw)

    prepare(config("unused"), progress=False)
    return config


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]


@pytest.mark.parametrize("bits", BITS)
def test_a_run_trains_resumes_and_exports(runs, bits):
    run = train(runs(f"whole-{bits}", quantize_base=bits), progress=False)
    course = losses(run)
    assert course[0] == pytest.approx(math.log(2.0), abs=1e-7), "policy and reference agree"
    assert all(loss != course[0] for loss in course[1:])

    train(runs(f"part-{bits}", quantize_base=bits, max_steps=2), progress=False)
    part = train(runs(f"part-{bits}", quantize_base=bits), resume=True, progress=False)
    assert losses(part) == course
    ends = [load_file(r / "final" / "pytorch_lora_weights.safetensors") for r in (run, part)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())
    assert all(tensor.dtype == torch.float32 for tensor in ends[0].values())

    model = ModelFolder(run.parent / "model")
    pipeline = model.family.pipeline_class.from_pretrained(model.path)
    pipeline.load_lora_weights(run / "final")
    assert pipeline.get_list_adapters()


def test_cached_errors_are_those_of_the_quantized_base(runs):
    live = train(runs("live"), progress=False)
    cached = runs("cached", reference="cached")
    prepare_reference(cached, progress=False)
    assert losses(train(cached, progress=False)) == pytest.approx(losses(live), rel=1e-5)
    with pytest.raises(CacheError, match=r"train\.quantize_base: .* made with '4bit'"):
        train(runs("other", reference="cached", quantize_base=None), progress=False)


@pytest.mark.parametrize("make", [tiny_z_image_folder, tiny_sd15_folder])
def test_the_layers_of_the_blocks_are_stored_in_few_bits_and_no_others(runs, make, tmp_path):
    model = ModelFolder(make(tmp_path / "model"))
    family, settings = model.family, runs("unused").train.model_copy()
    denoiser = family.load_denoiser(model).requires_grad_(False)
    names = set(quantizable(denoiser))
    assert names
    denoisers = setup_denoisers(family, denoiser, settings, needs_reference=True)
    layers = {
        name.replace(".base_layer", "")
        for name, module in denoisers.policy.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert layers == names
    assert not any(name.startswith(("x_embedder", "t_embedder", "conv_in")) for name in names)
    assert all(p.dtype == torch.float32 for p in denoisers.trainable.values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "full"}, "is for train.method: lora"),
        ({"deepspeed": "zero2"}, "does not work with train.deepspeed"),
        ({"lora": {"use_dora": True}}, "does not work with train.lora.use_dora"),
        ({"compile": True}, "does not work with train.compile"),
        ({"quantize_base": "3bit"}, "train.quantize_base"),
    ],
)
def test_what_it_does_not_go_with_is_refused(runs, options, text):
    with pytest.raises(ConfigError, match=text):
        runs("refused", **options)


def test_without_bitsandbytes_it_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes .*pip install 'fastpo\[8bit\]'"):
        train(runs("missing"), progress=False)
