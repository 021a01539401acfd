#!/usr/bin/env bash
# With gradient checkpointing a LoRA scale given per call reaches the loss and not the gradient.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, Python 3.11.
#
# What surprises: cross_attention_kwargs={"scale": s} sets the adapters' strength when forward
# begins and resets it when forward returns. Checkpointed blocks are run again during backward, when
# the strength is 1 again: the recomputed activations belong to another model than the loss does.
# The loss is equal to the last digit, the gradient is another one. Without checkpointing, or with
# the strength set by set_adapters(names, weights) for the whole step, both are right.
#
# Seen (scale 0.5):
#   diffusers 0.42.1 peft 0.21.2 torch 2.13.0+cpu
#   per call, no checkpointing:   loss 0.102257, gradient 0.033281
#   per call, checkpointing:      loss 0.102257, gradient 0.036346, cosine 0.9694
#   set_adapters, checkpointing:  loss 0.102257, gradient 0.033281, cosine 1.0000
#
# Why it matters: a scale per call is the way to train or judge with a weaker adapter (a reference
# between base and policy, adapter dropout by row), and checkpointing is what makes SDXL fit.
#
# What FastPO does: it gives no scale per call; adapters are on or off for a whole pass, and passes
# with them off run without gradients.

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
from torch.nn.functional import cosine_similarity

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
unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
for name, parameter in unet.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.2)
unet.train()
batch = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 7, 32)


def step(checkpointing, **options):
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
    unet.zero_grad()
    loss = unet(*batch, **options).sample.square().mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])
    return loss.item(), gradient


per_call = {"cross_attention_kwargs": {"scale": 0.5}}
loss, gradient = step(False, **per_call)
again, other = step(True, **per_call)
unet.set_adapters("default", 0.5)
set_loss, set_gradient = step(True)
print(f"per call, no checkpointing:   loss {loss:.6f}, gradient {gradient.norm():.6f}")
print(
    f"per call, checkpointing:      loss {again:.6f}, gradient {other.norm():.6f}, "
    f"cosine {cosine_similarity(gradient, other, dim=0):.4f}"
)
print(
    f"set_adapters, checkpointing:  loss {set_loss:.6f}, gradient {set_gradient.norm():.6f}, "
    f"cosine {cosine_similarity(gradient, set_gradient, dim=0):.4f}"
)
if loss != again:
    raise SystemExit("CHANGED: checkpointing changes the loss")
if torch.allclose(gradient, other, rtol=1e-2, atol=1e-4 * gradient.abs().max().item()):
    raise SystemExit("CHANGED: the gradient knows the scale given per call")
if not torch.allclose(gradient, set_gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()):
    raise SystemExit("CHANGED: with set_adapters the gradient under checkpointing is another one")
PYTHON
