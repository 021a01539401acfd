"""Plans of flow-matching transformers: sizes, quantization, and the real step's own numbers."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from fastpo.config import parse_config
from fastpo.models.denoisers import setup_denoisers
from fastpo.models.folder import ModelFolder, read_json
from fastpo.models.quantized import QuantizedLinear
from fastpo.models.registry import detect
from fastpo.plan import make_plan, planner, print_plan
from fastpo.plan.architecture import PACKAGED_FOLDERS, resolve_architecture
from fastpo.plan.choose import choose
from fastpo.plan.dataset import cache_size, find_size
from fastpo.plan.gpus import find_gpu
from fastpo.plan.measure import measure_forward
from fastpo.plan.planner import denoiser_call, make_shapes
from fastpo.plan.transformers import empty_transformer
from fastpo.testing import write_folder
from fastpo.testing.edits import small_sources
from tests.models.family_cases import CASES

# Billions of weights, as published or counted from the published configurations.
BILLIONS = {
    "Tongyi-MAI/Z-Image": 6.15,
    "Qwen/Qwen-Image": 20.43,
    "Qwen/Qwen-Image-2512": 20.43,
    "Qwen/Qwen-Image-Edit": 20.43,
    "Qwen/Qwen-Image-Edit-2509": 20.43,
    "black-forest-labs/FLUX.2-dev": 32.22,
    "black-forest-labs/FLUX.2-klein-base-4B": 3.88,
    "black-forest-labs/FLUX.2-klein-base-9B": 9.08,
    "black-forest-labs/FLUX.1-dev": 11.90,
    "black-forest-labs/FLUX.1-Kontext-dev": 11.90,
    "stabilityai/stable-diffusion-3.5-medium": 2.24,
    "stabilityai/stable-diffusion-3.5-large": 8.06,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1.60,
}
# Megabytes of a prompt at the pipelines' length in half precision.
TEXT = {
    "Tongyi-MAI/Z-Image": 2.62,
    "black-forest-labs/FLUX.2-dev": 15.73,
    "black-forest-labs/FLUX.2-klein-base-4B": 7.86,
    "black-forest-labs/FLUX.2-klein-base-9B": 12.58,
    "black-forest-labs/FLUX.1-dev": 4.20,
    "black-forest-labs/FLUX.1-Kontext-dev": 4.20,
    "stabilityai/stable-diffusion-3.5-medium": 2.73,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1.38,
}


def config(model, **train):
    length = train.pop("text_length", None)
    side = train.pop("resolution", 1024)
    return parse_config(
        {
            "model": {"path": str(model)},
            "data": {"source": "pickapic", "path": "unused"},
            "prepare": {"cache_dir": "unused", "resolution": side, "text_length": length},
            "train": {
                "output_dir": "unused",
                "objective": {"name": "dpo"},
                "max_steps": 10,
                "reference": "cached",
                **train,
            },
        }
    )


@pytest.mark.parametrize("name", PACKAGED_FOLDERS)
def test_packaged_architectures_are_the_real_models(name):
    architecture = resolve_architecture(config(name))
    assert "packaged" in architecture.source
    family = detect(architecture.folder.path)
    empty = empty_transformer(family, architecture.unet)
    count = sum(p.numel() for p in empty.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)
    assert architecture.resolution == 1024
    length = {"sd3": 256, "sana": 300}.get(family.name, 512)
    if name in TEXT:
        assert architecture.text(length).bytes(2) / 1e6 == pytest.approx(TEXT[name], abs=0.01)


def test_source_images_are_in_the_plan(tmp_path):
    """A pass sees them beside the image; the cache holds each distinct one once."""
    case = next(case for case in CASES if case.name == "flux.1-kontext")
    data = write_folder(tmp_path / "data", 6, sizes=((64, 64),), sources=((48, 48), (64, 32)))
    made = config(case.make(tmp_path / "model"), resolution=64, text_length=64)
    listed = made.data.model_copy(update={"source": "folder", "path": str(data)})
    made = made.model_copy(update={"data": listed})
    architecture = resolve_architecture(made)
    assert make_shapes(made, architecture).source == (512, 512)  # the VAE's factor is 2
    with small_sources(), patch.object(planner, "SOURCE_SIDE", 32):
        shapes, size = make_shapes(made, architecture), find_size(made, None)
    cache = cache_size(made, architecture, shapes, size=size, visits=60, hours=None)
    assert cache.source_bytes_per_image == 16 * 16 * 16 * 2
    assert cache.sources == 2 * cache.source_bytes_per_image
    assert cache.total == cache.latents + cache.text + cache.reference + cache.sources
    policy = empty_transformer(architecture.flow, architecture.unet)
    with_source, alone = (
        measure_forward(policy, one, "fp32", denoiser_call(architecture, policy, one)).flops
        for one in (shapes, replace(shapes, source=None))
    )
    tokens, more = 32 * 32 // 4 + 64, 16 * 16 // 4
    assert 1 + 0.5 * more / tokens < with_source / alone < (1 + more / tokens) ** 2


def test_a_text_that_sees_its_image_is_counted_with_it(tmp_path):
    """Per prompt and image; 1,369 or 196 tokens more."""
    data = write_folder(tmp_path / "data", 12, prompts=2, sources=((48, 48), (64, 32), (32, 32)))
    sizes = []
    for name in ("Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-Edit-2509"):
        made = config(name, text_length=100)
        listed = made.data.model_copy(update={"source": "folder", "path": str(data)})
        made = made.model_copy(update={"data": listed})
        architecture = resolve_architecture(made)
        shapes, size = make_shapes(made, architecture), find_size(made, None)
        assert (size.prompts, size.images, size.edits) == (2, 3, 6)
        assert shapes.source == (128, 128)
        cache = cache_size(made, architecture, shapes, size=size, visits=None, hours=None)
        assert cache.text == 6 * cache.text_bytes_per_prompt
        sizes.append(cache.text_bytes_per_prompt)
    token = 2 * 3584 + 1
    assert sizes == [(100 + 1369) * token, (100 + 196) * token]


@pytest.mark.parametrize(("name", "bound"), [("z-image", True), ("flux2-klein", False)])
def test_text_that_is_stored_without_padding_is_told_as_an_upper_bound(
    tmp_path, capsys, name, bound
):
    case = next(case for case in CASES if case.name == name)
    made = config(case.make(tmp_path / name), resolution=64, text_length=64)
    plan = make_plan(made, pairs=20000)
    print_plan(plan, Console(width=80))
    table = capsys.readouterr().out
    assert plan.cache.text_at_most == bound
    assert ("text at most, per distinct prompt (at most 20,000)" in table) == bound
    assert ("all at most; to prepare:" in table) == bound
    assert any(note.startswith("Text on disk: at most.") for note in plan.notes) == bound


QUICK = ("qwen-image", "flux2-dev", "sana")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.name in QUICK else [pytest.mark.slow])
        for case in CASES
        if case.name not in ("sd15", "sdxl")
    ],
    ids=lambda case: case.name,
)
def test_every_family_plans(case, tmp_path):
    folder = case.make(tmp_path / "model")
    settings = config(folder, resolution=64, text_length=64, gradient_checkpointing=True)
    plan = make_plan(settings, pairs=100)
    own, bare, theirs = plan.costs
    assert own.fits
    assert plan.family == ModelFolder(folder).family.name
    assert theirs.name.startswith("Flow-Factory")
    assert theirs.flops.reference > 0 == own.flops.reference
    assert theirs.flops.vae > 0 == theirs.flops.text
    assert own.tflop == pytest.approx(bare.tflop)
    assert theirs.slower > 1.2
    assert own.flops.policy_forward > 0


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_base_is_planned_with_the_bytes_that_it_has(bits, tmp_path):
    case = next(case for case in CASES if case.name == "z-image")
    model = ModelFolder(case.make(tmp_path / "model"))
    options = {"resolution": 64, "text_length": 64, "precision": "fp32"}
    plain, small = (
        make_plan(config(model.path, quantize_base=q, **options)).costs[0].memory
        for q in (None, bits)
    )
    settings = config(model.path, quantize_base=bits, **options).train
    denoiser = model.family.load_denoiser(model)
    policy = setup_denoisers(model.family, denoiser, settings, needs_reference=False).policy
    saved = 0
    for module in policy.modules():
        if isinstance(module, QuantizedLinear):
            saved += 4 * module.in_features * module.out_features - held_by(module)
    assert plain.weights - small.weights == saved
    assert saved > 0
    largest = max(
        module.in_features * module.out_features
        for module in policy.modules()
        if isinstance(module, QuantizedLinear)
    )
    assert small.activations - plain.activations == 4 * largest


def held_by(layer):
    """Bytes of a layer's codes and scales."""
    if layer.state is None:
        return layer.weight.nbytes + layer.scales.nbytes
    state, nested = layer.state, layer.state.state2
    scales = (state.absmax, state.code, nested.absmax, nested.code, state.offset)
    return layer.weight.nbytes + sum(tensor.nbytes for tensor in scales)


def test_the_packaged_files_name_their_families():
    for name in set(PACKAGED_FOLDERS.values()):
        folder = resolve_architecture(config(key_of(name))).folder
        index = read_json(folder.path / "model_index.json")
        assert index["_class_name"] == detect(folder.path).pipeline_class.__name__


def key_of(place):
    return next(name for name, own in PACKAGED_FOLDERS.items() if own == place)


@pytest.mark.long  # the shipped configurations of Qwen-Image are planned always
@pytest.mark.parametrize(
    ("bits", "gpu"), [(None, "h100"), ("4bit", "rtx4090")], ids=["80 GB", "24 GB"]
)
def test_adapters_of_qwen_image_fit_at_1024(bits, gpu):
    settings = config("Qwen/Qwen-Image", quantize_base=bits, gradient_checkpointing=True)
    assert make_plan(settings, gpu=gpu).costs[0].fits


@pytest.mark.slow
def test_init_takes_a_quantized_base_where_nothing_else_fits():
    settings = config("Qwen/Qwen-Image")
    architecture = resolve_architecture(settings)
    raw = settings.model_dump(mode="json")
    chosen = choose(raw, architecture, find_gpu("rtx4090"), method=None, batch=8, status=str)
    assert chosen.values["train.quantize_base"] == "4bit"
    assert chosen.bytes < 24e9


def test_the_texts_of_one_length_need_no_mask():
    """What lets the plan run them without values, and a batch of equal texts without a mask."""
    from fastpo.models.language import lengths

    assert lengths(torch.ones(2, 5, dtype=torch.bool)) == [5, 5]
