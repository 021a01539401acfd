#!/usr/bin/env bash
# A LoRA file written without adapter metadata loads at rank / alpha of its trained strength.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, Python 3.11.
#
# What surprises: save_lora_weights(folder, unet_lora_layers=...) writes the matrices and not alpha.
# Loading then takes alpha for the rank, without a warning: with r=8, lora_alpha=32 the adapter
# comes back at a quarter of its strength. With unet_lora_adapter_metadata it comes back equal.
#
# Seen:
#   diffusers 0.42.1 peft 0.21.2 torch 2.13.0+cpu
#   without metadata: rank 8, alpha 8, effect 0.250
#   with metadata: rank 8, alpha 32, effect 1.000
#
# Why it matters: a policy trained with alpha other than the rank is published, evaluated and
# compared at another strength than it was trained at, and looks like a weaker method.
#
# What FastPO does: it always writes the metadata (fastpo/models/export.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0

FOLDER=$work/lora "$python" - 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import os

import diffusers
import peft
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

print("diffusers", diffusers.__version__, "peft", peft.__version__, "torch", torch.__version__)


def new_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


@torch.no_grad()
def run(unet):
    torch.manual_seed(1)
    return unet(torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 7, 32)).sample


trained = new_unet()
trained.add_adapter(LoraConfig(r=8, lora_alpha=32, target_modules=["to_q", "to_v"]))
for name, parameter in trained.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
base, wanted = run(new_unet()), run(trained)
metadata = {"unet_lora_adapter_metadata": trained.peft_config["default"].to_dict()}
for title, options, alpha in (("without", {}, 8), ("with", metadata, 32)):
    folder = os.environ["FOLDER"] + title
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **options)
    state, alphas, stored = StableDiffusionPipeline.lora_state_dict(
        folder, return_lora_metadata=True
    )
    loaded = new_unet()
    StableDiffusionPipeline.load_lora_into_unet(
        state, network_alphas=alphas, unet=loaded, metadata=stored
    )
    (config,) = loaded.peft_config.values()
    ratio = ((run(loaded) - base).norm() / (wanted - base).norm()).item()
    print(f"{title} metadata: rank {config.r}, alpha {config.lora_alpha}, effect {ratio:.3f}")
    if config.lora_alpha != alpha:
        raise SystemExit(f"CHANGED: {title} metadata alpha comes back as {config.lora_alpha}")
    if abs(ratio - alpha / 32) > 0.05:
        raise SystemExit(f"CHANGED: {title} metadata the effect is {ratio} of the trained one")
PYTHON
