#!/usr/bin/env bash
# Switching to the reference adapter before backward leaves the policy adapter without gradient.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, Python 3.11.
#
# What surprises: set_adapter sets requires_grad of every adapter, False for all but the active one.
# Autograd asks for requires_grad when backward arrives, not when the graph was made. So with two
# adapters, "policy forward, switch, reference forward under no_grad, loss.backward()" runs without
# an error or a warning, the loss is right and requires a gradient, and every .grad stays None. With
# the reference first, or a switch back before backward, the gradient is there.
#
# Seen:
#   diffusers 0.42.1 peft 0.21.2 torch 2.13.0+cpu
#   policy, then reference: loss requires grad True, policy tensors with a gradient 0
#   reference, then policy: loss requires grad True, policy tensors with a gradient 32
#   policy, reference, switch back: loss requires grad True, policy tensors with a gradient 32
#
# Why it matters: this is how preference training with a frozen reference adapter is written
# (policy and reference share one base model). Losses and margins look as before a first step,
# the optimizer skips parameters without gradients, and nothing is ever learned.
#
# What FastPO does: one adapter; the reference is the base with adapters off, and denoisers switch
# inside a block that restores the policy before the loss is formed.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0

"$python" - <<'PYTHON'
import diffusers
import peft
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

print("diffusers", diffusers.__version__, "peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
)
for name in ("policy", "reference"):
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]), adapter_name=name)
batch = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 7, 32)


def policy():
    unet.set_adapter("policy")
    return unet(*batch).sample


def reference():
    unet.set_adapter("reference")
    with torch.no_grad():
        return unet(*batch).sample


def gradients(title, order, *, back=False):
    unet.zero_grad(set_to_none=True)
    outputs = {run: run() for run in order}
    if back:
        unet.set_adapter("policy")
    loss = (outputs[policy] - 1).square().mean() - (outputs[reference] - 1).square().mean().detach()
    loss.backward()
    n = sum(p.grad is not None for key, p in unet.named_parameters() if ".policy." in key)
    print(f"{title}: loss requires grad {loss.requires_grad}, policy tensors with a gradient {n}")
    return n


total = sum(".policy." in key for key, _ in unet.named_parameters())
if gradients("policy, then reference", (policy, reference)) != 0:
    raise SystemExit("CHANGED: the policy adapter gets gradients after a switch")
if gradients("reference, then policy", (reference, policy)) != total:
    raise SystemExit("CHANGED: the other order gives no gradients either")
if gradients("policy, reference, switch back", (policy, reference), back=True) != total:
    raise SystemExit("CHANGED: switching back before backward no longer helps")
PYTHON
