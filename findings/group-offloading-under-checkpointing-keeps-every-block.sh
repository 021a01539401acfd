#!/usr/bin/env bash
# diffusers' group offloading saves nothing in training with gradient checkpointing: no block leaves again.
#
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
#
# What surprises: apply_group_offloading loads a block before its forward pass and takes it off the device
# behind it. Under gradient checkpointing the backward pass runs each block's forward once more, and the hook
# before it loads the block; but torch ends that recomputation by an exception as soon as it has what it needs,
# so the hook behind the block is never called. After the backward pass every block is on the device.
#
# Seen:
#   diffusers 0.42.1
#   forward: 5 loads, 5 offloads
#   backward: 4 loads, 0 offloads
#
# Why it matters: whoever offloads a frozen base block by block to train adapters on a small card sees the
# memory of the whole base at the end of each backward pass, and no error that says why. Without checkpointing
# the backward pass meets weights that have left.
#
# What FastPO does: it does not offer group offloading for training, and says why (docs/flow-models.md);
# train.quantize_base and ZeRO-3 lower the memory of a large base.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0

cat > "$work/try.py" <<'PYTHON'
from collections import Counter

import diffusers
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

print("diffusers", diffusers.__version__)
calls, phase = Counter(), "setting up"


def counting(name):
    plain = getattr(ModuleGroup, name)

    def call(self, *args, **kwargs):
        calls[phase, name] += 1
        return plain(self, *args, **kwargs)

    return call


for name in ("onload_", "offload_"):
    setattr(ModuleGroup, name, counting(name))
torch.manual_seed(0)
model = FluxTransformer2DModel(
    in_channels=4,
    num_layers=4,
    num_single_layers=0,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=(4, 4, 8),
)
model.enable_gradient_checkpointing()
# Both devices are the CPU: what moves is not looked at, but what is asked for.
apply_group_offloading(
    model,
    onload_device=torch.device("cpu"),
    offload_device=torch.device("cpu"),
    offload_type="block_level",
    num_blocks_per_group=1,
)
phase = "forward"
out = model(
    hidden_states=torch.randn(1, 4, 4),
    encoder_hidden_states=torch.randn(1, 3, 32),
    pooled_projections=torch.randn(1, 32),
    timestep=torch.ones(1),
    img_ids=torch.zeros(4, 3),
    txt_ids=torch.zeros(3, 3),
    return_dict=False,
)[0]
phase = "backward"
out.square().mean().backward()
found = [calls[when, name] for when in ("forward", "backward") for name in ("onload_", "offload_")]
print(f"forward: {found[0]} loads, {found[1]} offloads")
print(f"backward: {found[2]} loads, {found[3]} offloads")
if found != [5, 5, 4, 0]:
    raise SystemExit(f"CHANGED: {found}")
PYTHON
"$python" "$work/try.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
