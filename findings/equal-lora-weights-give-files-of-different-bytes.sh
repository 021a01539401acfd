#!/usr/bin/env bash
# The same LoRA weights, saved twice by diffusers, give files of different bytes.
#
# Versions: safetensors 0.8.0, diffusers 0.42.1, peft 0.21.2, torch 2.13.0, Python 3.11.
#
# What surprises: two orders are left to chance. safetensors writes the entries of a file's metadata
# in the random order of a hash map: two entries are enough, and the order changes within one
# process. peft keeps target_modules as a set of strings, so the adapter's configuration, which
# diffusers stores in the metadata, lists them in an order that depends on Python's hash seed. The
# tensors are equal.
#
# Seen:
#   safetensors 0.8.0 diffusers 0.42.1 peft 0.21.2 torch 2.13.0+cpu
#   32 saves of one tensor with two entries of metadata, one process: 2 different files
#   save_lora_weights under 4 hash seeds: equal tensors, more than one list of target_modules
#
# Why it matters: a hash of the file is what people compare to see whether two runs gave the same
# result, what a cache of models goes by, and what model pages publish.
#
# What FastPO does: it sorts the lists and writes the header's entries in one order
# (fastpo/models/export.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install safetensors==0.8.0 diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0

cat > "$work/metadata.py" <<'PYTHON'
import diffusers
import peft
import safetensors
import torch
from safetensors.torch import save

print("safetensors", safetensors.__version__, "diffusers", diffusers.__version__, end=" ")
print("peft", peft.__version__, "torch", torch.__version__)
metadata = {"format": "pt", "title": "a LoRA"}
files = {save({"weight": torch.zeros(4)}, metadata) for _ in range(32)}
print("32 saves of one tensor with two entries of metadata, one process:", len(files), end=" ")
print("different files")
if len(files) != 2:
    raise SystemExit("CHANGED: metadata is written in one order")
PYTHON
"$python" "$work/metadata.py" 2>"$work/log" || { cat "$work/log"; exit 1; }

cat > "$work/save.py" <<'PYTHON'
import hashlib
import json
import sys

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open

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
unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
StableDiffusionPipeline.save_lora_weights(
    sys.argv[1],
    unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
    unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
)
digest = hashlib.sha256()
with safe_open(f"{sys.argv[1]}/pytorch_lora_weights.safetensors", "pt") as file:
    for name in sorted(file.keys()):
        digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
    stored = json.loads(file.metadata()["lora_adapter_metadata"])
print(digest.hexdigest(), json.dumps(stored["unet.target_modules"]))
PYTHON
for seed in 0 1 2 3; do
  PYTHONHASHSEED=$seed "$python" "$work/save.py" "$work/$seed" >>"$work/saved" 2>"$work/log" || { cat "$work/log"; exit 1; }
done
tensors=$(cut -d' ' -f1 "$work/saved" | sort -u | wc -l)
lists=$(cut -d' ' -f2- "$work/saved" | sort -u | wc -l)
if [ "$tensors" != 1 ]; then echo "CHANGED: the tensors are not equal"; exit 1; fi
if [ "$lists" -lt 2 ]; then echo "CHANGED: target_modules has one order under all hash seeds"; exit 1; fi
echo "save_lora_weights under 4 hash seeds: equal tensors, more than one list of target_modules"
