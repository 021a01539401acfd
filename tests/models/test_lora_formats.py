"""A run's LoRA for other programs: names, alpha, and that it computes as the run's own file."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fastpo.cli import main
from fastpo.config import load_config, parse_config
from fastpo.config.sections import LoraConfig
from fastpo.errors import CheckpointError, ModelError
from fastpo.models.denoisers import add_lora
from fastpo.models.export import LORA_FILE
from fastpo.models.folder import ModelFolder
from fastpo.models.lora_formats import original_name, write_lora
from fastpo.models.lora_start import start_from_lora
from fastpo.train import train
from fastpo.train.consolidate import export_lora
from tests.models.family_cases import CASES

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv"]
QUERY = "transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def runs(tiny_data, tiny_pipelines, tiny_caches, tmp_path_factory):
    """A run of each family whose alpha is not its rank, with adapters on many kinds of layers."""
    folders = {}
    for family, pipeline in tiny_pipelines.items():
        folder = tmp_path_factory.mktemp("runs") / family
        prepared = {"cache_dir": str(tiny_caches / family), "store_precision": "fp32"}
        training = {
            "output_dir": str(folder),
            "lora": {"rank": 4, "alpha": 6.0, "target_modules": TARGETS + CONVOLUTIONS},
            "objective": {"name": "dpo", "beta": 500.0},
            "optim": {"lr": 0.02},
            "max_steps": 2,
            "ema_decay": 0.5,
            "precision": "fp32",
            "trackers": [],
        }
        sections = {
            "seed": 7,
            "model": {"path": str(pipeline)},
            "data": {"source": "folder", "path": str(tiny_data)},
            "prepare": {"resolution": 32, **prepared},
            "train": training,
        }
        folders[family] = train(parse_config(sections), progress=False)
    return folders


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """The file of each family and format."""
    folder = tmp_path_factory.mktemp("exported")
    return {
        (family, form): export_lora(runs[family], folder / f"{family}-{form}.safetensors", form)
        for family in runs
        for form in ("kohya", "comfyui", "diffusers")
    }


@pytest.fixture(scope="module")
def pipelines(tiny_pipelines):
    return {
        family: kind.from_pretrained(tiny_pipelines[family], safety_checker=None)
        for family, kind in PIPELINES.items()
    }


def loaded(pipeline, lora):
    """The UNet's answer with a LoRA loaded as its users load it, and each layer's adapter."""
    unet = pipeline.unet
    generator = torch.Generator().manual_seed(0)
    size = unet.config.cross_attention_dim
    sdxl = unet.config.addition_embed_type == "text_time"
    added = {"text_embeds": torch.ones(1, 20), "time_ids": torch.ones(1, 6)} if sdxl else None
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="lora")
    try:
        adapters = {
            name: (layer.lora_A["lora"].weight, layer.lora_B["lora"].weight, layer.scaling["lora"])
            for name, layer in unet.named_modules()
            if isinstance(layer, LoraLayer)
        }
        with torch.no_grad():
            image = unet(
                torch.randn(1, 4, 8, 8, generator=generator),
                torch.tensor([500]),
                torch.randn(1, 77, size, generator=generator),
                added_cond_kwargs=added,
            ).sample
    finally:
        pipeline.unload_lora_weights()
    return image, adapters


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_file_computes_what_the_runs_own_does(runs, exported, pipelines, family):
    own = runs[family] / "final" / "pytorch_lora_weights.safetensors"
    image, adapters = loaded(pipelines[family], own)
    trained = load_file(
        sorted((runs[family] / "checkpoints").iterdir())[-1] / "trainable.safetensors"
    )
    assert 2 * len(adapters) == len(trained)  # a loader leaves out in silence what it cannot name
    for form in ("kohya", "comfyui", "diffusers"):
        file = exported[family, form]
        assert not list(file.parent.glob(".*"))
        again, others = loaded(pipelines[family], file)
        assert adapters.keys() == others.keys()
        for name, (down, up, scale) in adapters.items():
            assert torch.equal(others[name][0], down), name
            assert torch.equal(others[name][1], up), name
            assert others[name][2] == scale == 1.5, name
        torch.testing.assert_close(again, image, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_names_alpha_and_metadata_are_those_that_tensor_loaders_read(exported, family, form):
    tensors = load_file(exported[family, form])
    layers = {name.split(".")[0] for name in tensors}
    kinds = {"lora_down.weight", "lora_up.weight", "alpha"}
    assert set(tensors) == {f"{layer}.{kind}" for layer in layers for kind in kinds}
    assert all(tensors[f"{layer}.alpha"].item() == 6.0 for layer in layers)
    assert all(len(tensors[f"{layer}.lora_down.weight"]) == 4 for layer in layers)
    if form == "kohya" and family == "sdxl":
        # input_blocks: conv_in, one layer and the downsampler of block 0, one layer of block 1
        first = f"lora_unet_input_blocks_3_1_{QUERY}"
    else:
        first = f"lora_unet_down_blocks_1_attentions_0_{QUERY}"
    assert first in layers
    with safe_open(exported[family, form], framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "6.0"
    versions = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}
    assert metadata["ss_base_model_version"] == versions[family]


@pytest.mark.parametrize("blocks", [(2, 2, 2), (1, 3, 2)])
def test_original_names_are_those_that_diffusers_reads_back(blocks):
    """On SDXL's UNet, narrower; and on one whose levels have other numbers of transformers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=blocks,
            layers_per_block=2,
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            use_linear_projection=True,
        )
    layers = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    kinds = ("weight", "bias")
    single = {
        f"model.diffusion_model.{original_name(n, unet)}.{k}": n for n in layers for k in kinds
    }
    assert len(single) == len(kinds) * len(layers)
    back = convert_ldm_unet_checkpoint(single, dict(unet.config))
    assert back == {f"{layer}.{kind}": layer for layer in layers for kind in kinds}
    known = "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k"
    assert original_name(known, unet).startswith("input_blocks.8.1.transformer_blocks.0.attn2.to_k")


def test_the_average_is_exported_and_equal_weights_give_equal_bytes(runs, tmp_path):
    a, b = (export_lora(runs["sd15"], tmp_path / n, "comfyui") for n in ("a", "b"))
    assert a == tmp_path / "a" / "pytorch_lora_weights.safetensors"
    assert a.read_bytes() == b.read_bytes()
    average = export_lora(runs["sd15"], tmp_path / "c", "comfyui", average=True)
    assert average.read_bytes() != a.read_bytes()
    own = load_file(runs["sd15"] / "ema" / "pytorch_lora_weights.safetensors")
    name = f"lora_unet_mid_block_attentions_0_{QUERY}.lora_up.weight"
    diffusers = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"
    assert torch.equal(load_file(average)[name], own[diffusers])


def test_nothing_is_replaced_and_what_holds_no_lora_is_named(runs, tmp_path, capsys, experiment):
    there = tmp_path / "mine.safetensors"
    there.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"mine\.safetensors is there"):
        export_lora(runs["sd15"], there, "kohya")
    (tmp_path / "text").write_text("mine")
    with pytest.raises(CheckpointError, match="is no folder"):
        export_lora(runs["sd15"], tmp_path / "text", "kohya")
    with pytest.raises(CheckpointError, match=r"flux\.bin is no folder: .* ends in .safetensors"):
        export_lora(runs["sd15"], tmp_path / "flux.bin", "kohya")
    assert not (tmp_path / "flux.bin").exists()
    assert there.read_bytes() == b"mine"
    full = train(load_config(experiment(method="full", max_steps=1)), progress=False)
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(full), str(tmp_path / "new.safetensors"), "--format", "kohya"])
    assert stopped.value.code == 2
    assert "fastpo consolidate" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new.safetensors").exists()


TRANSFORMERS = [case for case in CASES if case.name in ("z-image", "flux.1-dev", "qwen-image")]


@pytest.mark.parametrize("case", TRANSFORMERS, ids=lambda case: case.name)
@pytest.mark.parametrize("rslora", [False, True])
def test_comfyui_gets_a_transformers_names_with_alpha(case, rslora, tmp_path):
    """`transformer.NAME` with lora_A, lora_B and alpha, which scale as peft scales."""
    model = ModelFolder(case.make(tmp_path / "model"))
    policy = model.family.load_denoiser(model)
    targets = model.family.lora_targets[:4]
    config = LoraConfig(rank=4, alpha=6.0, target_modules=targets, use_rslora=rslora)
    add_lora(model.family, policy, config)
    weights = {n: torch.randn_like(p) for n, p in policy.named_parameters() if p.requires_grad}
    file = tmp_path / "lora.safetensors"
    write_lora(model.family, policy, weights, file, "comfyui")
    named = load_file(file)
    layers = {name.removesuffix(".alpha") for name in named if name.endswith(".alpha")}
    plain = dict(model.family.load_denoiser(model).named_modules())
    for layer in layers:
        known = plain[layer.removeprefix("transformer.")]
        down, up = (named[f"{layer}.lora_{side}.weight"] for side in "AB")
        assert (up @ down).shape == known.weight.shape
        peft = policy.get_submodule(layer.removeprefix("transformer."))
        assert float(named[f"{layer}.alpha"]) / 4 == pytest.approx(peft.scaling["default"])
    assert len(named) == 3 * len(layers) == 3 * len(weights) // 2
    # What was written, and what a run exports, is where another run begins.
    model.family.save(policy, tmp_path, "lora", weights)
    for source in (file, tmp_path / LORA_FILE):
        fresh = model.family.load_denoiser(model)
        add_lora(model.family, fresh, config)
        start_from_lora(model.family, fresh, source)
        own = dict(fresh.named_parameters())
        assert all(torch.equal(own[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("name", "form", "other"),
    [
        ("sana", "comfyui", "diffusers"),
        ("sana", "kohya", "diffusers"),
        ("z-image", "kohya", "comfyui or diffusers"),
    ],
)
def test_what_has_no_settled_names_is_refused(tmp_path, name, form, other):
    case = next(case for case in CASES if case.name == name)
    model = ModelFolder(case.make(tmp_path / "model"))
    with pytest.raises(
        ModelError, match=rf"--format {form} .*, not of {name}; use --format {other}"
    ):
        write_lora(model.family, model.family.load_denoiser(model), {}, tmp_path / "x", form)
