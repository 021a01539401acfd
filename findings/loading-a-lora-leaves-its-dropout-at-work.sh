#!/usr/bin/env bash
# A LoRA that was trained with dropout is sampled with that dropout at work.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, Python 3.11.
#
# What surprises: a pipeline's models are in evaluation mode, and stay so by their own flag. But the
# layers that loading a LoRA adds come from the adapter's configuration in the file's metadata,
# lora_dropout included, and are made in training mode. Nothing sets them to evaluation afterwards,
# and `unet.training` is False. So each forward pass of sampling drops a part of the adapter's input
# at random: the same latents give another prediction at each call.
#
# Seen (rank 8, lora_dropout 0.5; distances in units of the adapter's whole effect):
#   diffusers 0.42.1 peft 0.21.2 torch 2.13.0+cpu
#   loaded: unet.training False, 16 of 16 dropouts of the adapter in training mode
#   two calls with the same inputs: not equal, 0.87 from the trained adapter
#   after unet.eval(): equal, 0.00 from the trained adapter
#
# Why it matters: images of a published LoRA are noisier than those of the trained model, change from
# call to call beyond the seed of the latents, and scores of it are too low. Files without adapter
# metadata, as most trainers write, are not concerned: dropout is then 0.
#
# What FastPO does: it writes 0 for lora_dropout into the metadata of final/
# (fastpo/models/export.py), and sets the denoiser to evaluation mode before it samples.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0

cat > "$work/load.py" <<'PYTHON'
import sys

import diffusers
import peft
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

print("diffusers", diffusers.__version__, "peft", peft.__version__, "torch", torch.__version__)
folder = sys.argv[1]


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


torch.manual_seed(1)
inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 7, 32)


@torch.no_grad()
def run(unet, seed=0):
    torch.manual_seed(seed)
    return unet(*inputs).sample


trained = new_unet()
targets = ["to_q", "to_v"]
trained.add_adapter(LoraConfig(r=8, lora_alpha=8, lora_dropout=0.5, target_modules=targets))
for name, parameter in trained.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.05)
trained.eval()
wanted = run(trained)
effect = (wanted - run(new_unet())).norm()
StableDiffusionPipeline.save_lora_weights(
    folder,
    unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(trained)),
    unet_lora_adapter_metadata=trained.peft_config["default"].to_dict(),
)
state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(folder, return_lora_metadata=True)
unet = new_unet()
StableDiffusionPipeline.load_lora_into_unet(
    state, network_alphas=alphas, unet=unet, metadata=metadata
)
dropouts = [m for name, m in unet.named_modules() if "lora_dropout." in name]
training = sum(module.training for module in dropouts)
print(f"loaded: unet.training {unet.training}, {training} of {len(dropouts)} dropouts", end=" ")
print("of the adapter in training mode")


def compare(title):
    first, second = run(unet, seed=1), run(unet, seed=2)
    equal = torch.equal(first, second)
    apart = ((first - wanted).norm() / effect).item()
    print(f"{title}: {'equal' if equal else 'not equal'}, {apart:.2f} from the trained adapter")
    return equal, apart


loaded = compare("two calls with the same inputs")
unet.eval()
evaluated = compare("after unet.eval()")
if not training or loaded[0] or loaded[1] < 0.2:
    raise SystemExit("CHANGED: a loaded LoRA's dropout is not at work")
if not evaluated[0] or evaluated[1] > 1e-3:
    raise SystemExit("CHANGED: in evaluation mode the loaded LoRA is not the trained one")
PYTHON
"$python" "$work/load.py" "$work/lora" 2>"$work/log" || { cat "$work/log"; exit 1; }
