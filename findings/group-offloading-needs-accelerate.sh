#!/usr/bin/env bash
# diffusers' group offloading needs accelerate, and says so only by a NameError at the first forward pass.
#
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11, without accelerate.
#
# What surprises: accelerate is optional in diffusers, and what needs it usually says so. apply_group_offloading
# is applied without it, takes the weights off, and the first forward pass ends with "name 'send_to_device' is
# not defined": the name is imported from accelerate where that is installed, and used in any case.
#
# Seen:
#   diffusers 0.42.1, accelerate: not installed
#   applied
#   forward: NameError: name 'send_to_device' is not defined
#
# Why it matters: the message names neither accelerate nor group offloading, and comes after the weights were
# loaded and moved.
#
# What FastPO does: it requires accelerate, and offers no group offloading (docs/flow-models.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1

cat > "$work/try.py" <<'PYTHON'
import importlib.util

import diffusers
import torch
from diffusers import UNet2DModel
from diffusers.hooks import apply_group_offloading

there = importlib.util.find_spec("accelerate") is not None
print(f"diffusers {diffusers.__version__}, accelerate: {'' if there else 'not '}installed")
model = UNet2DModel(
    sample_size=8,
    block_out_channels=(8, 8),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
).requires_grad_(False)
cpu = torch.device("cpu")
apply_group_offloading(
    model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
)
print("applied")
try:
    model(torch.zeros(1, 3, 8, 8), 1)
    told = "an answer"
except NameError as error:
    told = f"NameError: {error}"
print("forward:", told)
if there or "send_to_device" not in told:
    raise SystemExit("CHANGED: group offloading works without accelerate, or says that it does not")
PYTHON
"$python" "$work/try.py" 2> "$work/log" | grep -E "^(diffusers|applied|forward)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
