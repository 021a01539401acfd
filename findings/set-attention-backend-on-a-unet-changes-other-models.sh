#!/usr/bin/env bash
# set_attention_backend() on a UNet leaves the UNet as it is and changes every other model.
#
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
#
# What surprises: UNet2DConditionModel inherits set_attention_backend, which says nothing but that
# it is experimental. Its processors (AttnProcessor2_0) call torch directly and have no backend to
# set, so the UNet runs the kernel it ran before. The call also sets the backend of the process, so
# a transformer whose backend nobody has set runs another kernel from then on.
#
# Seen (calls of torch's kernels in one forward pass on a CPU):
#   diffusers 0.42.1 torch 2.13.0+cpu
#   UNet, before: fused 8, by matrix products 0
#   transformer, before: fused 2, by matrix products 0
#   unet.set_attention_backend("_native_math")
#   UNet, after: fused 8, by matrix products 0
#   transformer, after: fused 0, by matrix products 2
#
# Why it matters: "flash attention on" is then believed of SD1.5 and SDXL and measured as no gain,
# and the numbers of a transformer in the same process (a reference, a judge) move.
#
# What FastPO does: it sets attention processors of its own (fastpo/models/attention.py), tried
# once, forward and backward, before training.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 transformers==5.23.0

"$python" - 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import diffusers
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

print("diffusers", diffusers.__version__, "torch", torch.__version__)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
)
transformer = FluxTransformer2DModel(
    patch_size=1,
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=16,
    axes_dims_rope=[4, 4, 8],
)


class Kernels(TorchDispatchMode):
    """Counts the calls of attention kernels; the math kernel is seen by its softmax."""

    def __init__(self):
        super().__init__()
        self.fused, self.math = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.fused += "flash_attention" in str(function)
        self.math += "_softmax" in str(function) or "_safe_softmax" in str(function)
        return function(*args, **(kwargs or {}))


def run(title, call):
    with torch.no_grad(), Kernels() as kernels:
        call()
    print(f"{title}: fused {kernels.fused}, by matrix products {kernels.math}")
    return kernels.fused, kernels.math


def run_unet():
    unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32))


def run_transformer():
    transformer(
        hidden_states=torch.randn(1, 16, 4),
        encoder_hidden_states=torch.randn(1, 7, 32),
        pooled_projections=torch.randn(1, 16),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(7, 3),
    )


before = run("UNet, before", run_unet), run("transformer, before", run_transformer)
unet.set_attention_backend("_native_math")
print('unet.set_attention_backend("_native_math")')
after = run("UNet, after", run_unet), run("transformer, after", run_transformer)
if before[0][0] == 0 or after[0] != before[0]:
    raise SystemExit("CHANGED: the UNet runs other kernels after set_attention_backend")
if before[1][0] == 0 or after[1][0] != 0:
    raise SystemExit("CHANGED: set_attention_backend on the UNet leaves the transformer alone")
PYTHON
