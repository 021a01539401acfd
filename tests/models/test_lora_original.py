"""LoRA of transformers under the original layers' names, through diffusers' own converters."""

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file

from fastpo.config import LoraConfig
from fastpo.errors import ModelError
from fastpo.models.denoisers import add_lora
from fastpo.models.folder import ModelFolder
from fastpo.models.lora_formats import write_lora
from fastpo.models.lora_original import NAMED, Adapter, kohya_tensors, original_adapters
from tests.models.family_cases import CASES

WIDTH = 3072
"""FLUX.1's, which the converters hold as a number."""
ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
LAYERS = {
    "sd3": {
        "transformer_blocks.0": (
            *ATTENTION,
            *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            "norm1.linear",
        )
    },
    "flux": {
        "transformer_blocks.0": (
            *ATTENTION,
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            *("norm1.linear", "norm1_context.linear"),
        ),
        "single_transformer_blocks.0": (
            *("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear"),
        ),
    },
    "flux2-klein": {
        "transformer_blocks.0": (
            *ATTENTION,
            *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        ),
        "single_transformer_blocks.0": ("attn.to_qkv_mlp_proj", "attn.to_out"),
    },
}
CONVERTERS = {
    "sd3": convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": convert_flux_transformer_checkpoint_to_diffusers,
    "flux2-klein": convert_flux2_transformer_checkpoint_to_diffusers,
}


class Zeros(dict):
    """A checkpoint that has whatever weight it is asked for."""

    def __missing__(self, key):
        return torch.zeros(12, 2)

    def pop(self, key, *default):
        return super().pop(key) if key in self else self[key]


def rows(family):
    """Output features of a layer; of FLUX.1's single blocks the real ones."""

    def of(layer):
        if family == "flux" and layer.startswith("single_"):
            return 4 * WIDTH if layer.endswith("proj_mlp") else WIDTH
        return 6

    return of


def make_adapters(family, *, without=(), rank=2):
    generator = torch.Generator().manual_seed(0)
    layers = [
        f"{block}.{layer}"
        for block, layers in LAYERS[family].items()
        for layer in layers
        if layer not in without
    ]
    return {
        layer: Adapter(
            torch.randn(rank, 2, generator=generator),
            torch.randn(rows(family)(layer), rank, generator=generator),
            6.0,
        )
        for layer in layers
    }


def delta(adapter):
    return adapter.up @ adapter.down * (adapter.alpha / len(adapter.down))


@pytest.mark.parametrize("without", [(), ("attn.to_k", "proj_mlp", "attn.add_v_proj")])
@pytest.mark.parametrize("family", [*LAYERS])
def test_the_original_models_weights_move_as_diffusers_do(family, without):
    """What is added to a checkpoint of the original code, converted, is what diffusers adds."""
    adapters = make_adapters(family, without=without)
    original = original_adapters(family, adapters, rows(family))
    moved = Zeros({f"{layer}.weight": delta(one) for layer, one in original.items()})
    if family == "sd3":  # the last block's text has no layers behind its queries, keys and values
        moved["joint_blocks.1.x_block.attn.qkv.weight"] = torch.zeros(18, 2)
    if family == "flux":
        moved["single_blocks.0.linear1.bias"] = torch.zeros(7 * WIDTH)
    found = CONVERTERS[family](moved)
    for layer in make_adapters(family):
        expected = delta(adapters[layer]) if layer in adapters else torch.zeros(())
        torch.testing.assert_close(
            found[f"{layer}.weight"], expected.expand_as(found[f"{layer}.weight"])
        )


def test_kohyas_flux_file_comes_back_from_diffusers_as_it_was():
    adapters = make_adapters("flux")
    tensors = kohya_tensors(original_adapters("flux", adapters, rows("flux")))
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (6, 2)
    assert float(tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"]) == 18.0
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * WIDTH, 8)
    back = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    expected = {}
    for layer, adapter in adapters.items():
        expected[f"transformer.{layer}.lora_A.weight"] = 3.0 * adapter.down
        expected[f"transformer.{layer}.lora_B.weight"] = adapter.up
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_parts_of_other_ranks_and_alphas_are_joined():
    one = make_adapters("flux2-klein")
    other = make_adapters("flux2-klein", rank=5)
    adapters = one | {"transformer_blocks.0.attn.to_v": other["transformer_blocks.0.attn.to_v"]}
    joined = original_adapters("flux2-klein", adapters, rows("flux2-klein"))
    whole = joined["double_blocks.0.img_attn.qkv"]
    assert whole.down.shape == (15, 2)
    parts = [adapters[f"transformer_blocks.0.attn.to_{name}"] for name in "qkv"]
    torch.testing.assert_close(delta(whole), torch.cat([delta(part) for part in parts]))


READ = [
    case for case in CASES if case.name in ("flux2-klein", "qwen-image", "qwen-image-edit-2509")
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_pipelines_read_kohyas_file_as_the_run_was_trained(case, tmp_path):
    model = ModelFolder(case.make(tmp_path / "model"))
    policy = model.family.load_denoiser(model)
    config = LoraConfig(rank=4, alpha=6.0, target_modules=model.family.lora_targets)
    add_lora(model.family, policy, config)
    weights = {n: torch.randn_like(p) for n, p in policy.named_parameters() if p.requires_grad}
    file = tmp_path / "lora.safetensors"
    write_lora(model.family, policy, weights, file, "kohya")
    assert {name.rpartition("_")[0][:10] for name in load_file(file)} == {"lora_unet_"}
    pipeline = model.family.pipeline(model, torch.float32)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    loaded = dict(pipeline.transformer.named_modules())
    named = {name.removesuffix(".lora_A.default.weight") for name in weights if "lora_A" in name}
    for layer in named:
        own = [weights[f"{layer}.lora_{side}.default.weight"] for side in "AB"]
        there = loaded[layer]
        down, up = there.lora_A["default_0"].weight, there.lora_B["default_0"].weight
        found = up @ down * there.scaling["default_0"]
        torch.testing.assert_close(found, own[1] @ own[0] * 1.5, rtol=1e-5, atol=1e-5)
    adapted = [name for name, module in loaded.items() if hasattr(module, "lora_A")]
    assert {name for name in adapted if len(loaded[name].lora_A)} == named


def test_a_layer_without_a_name_is_refused():
    layers = {
        "sd3": "pos_embed.proj",
        "flux": "norm_out.linear",
        "flux2-dev": "double_stream_modulation_img.linear",
    }
    adapter = Adapter(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)
    for family, layer in layers.items():
        with pytest.raises(ModelError, match=f"kohya: {layer} of {family} has no name"):
            original_adapters(family, {layer: adapter}, rows(family))


@pytest.mark.parametrize("name", ["flux.1-kontext", "qwen-image-edit"])
def test_comfyui_gets_the_models_that_edit_too(name, tmp_path):
    case = next(case for case in CASES if case.name == name)
    model = ModelFolder(case.make(tmp_path / "model"))
    policy = model.family.load_denoiser(model)
    add_lora(model.family, policy, LoraConfig(rank=2, target_modules=("to_q",)))
    weights = {n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}
    write_lora(model.family, policy, weights, tmp_path / "lora.safetensors", "comfyui")
    named = load_file(tmp_path / "lora.safetensors")
    assert all(
        layer.startswith("transformer.transformer_blocks.") or "single" in layer for layer in named
    )
    assert model.family.name in NAMED


def test_comfyui_refuses_a_layer_that_it_would_leave_out(tmp_path):
    case = next(case for case in CASES if case.name == "flux2-klein")
    model = ModelFolder(case.make(tmp_path / "model"))
    policy = model.family.load_denoiser(model)
    targets = ("double_stream_modulation_img.linear",)
    add_lora(model.family, policy, LoraConfig(rank=2, target_modules=targets))
    weights = {n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}
    with pytest.raises(ModelError, match="ComfyUI reads no adapter of double_stream_modulation"):
        write_lora(model.family, policy, weights, tmp_path / "lora.safetensors", "comfyui")
