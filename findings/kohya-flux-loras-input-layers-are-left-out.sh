#!/usr/bin/env bash
# FluxPipeline.load_lora_weights leaves kohya's adapters of FLUX.1's input layers out without a word.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, Python 3.11.
#
# What surprises: sd-scripts can train adapters on img_in, txt_in, time_in, vector_in and guidance_in
# (in_dims). diffusers' converter knows them, but names them x_embedder and so on without "transformer.",
# which it puts before all other layers, and the loader takes only what begins with it.
#
# Seen:
#   diffusers 0.42.1
#   in the file: double_blocks_0_img_attn_proj img_in txt_in
#   converted: context_embedder transformer.transformer_blocks.0.attn.to_out.0 x_embedder
#   loaded: transformer_blocks.0.attn.to_out.0
#
# Why it matters: the LoRA draws other images in diffusers than in the program that it was trained for.
#
# What FastPO does: `fastpo export --format kohya` writes adapters of the blocks' layers alone, and refuses
# others by name (fastpo/models/lora_original.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0

cat > "$work/try.py" <<'PYTHON'
import diffusers
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

print("diffusers", diffusers.__version__)
transformer = FluxTransformer2DModel(
    in_channels=4,
    num_layers=1,
    num_single_layers=0,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=(4, 4, 8),
)
layers = {"img_in": (4, 32), "txt_in": (32, 32), "double_blocks_0_img_attn_proj": (32, 32)}
lora = {}
for name, (inside, outside) in layers.items():
    lora[f"lora_unet_{name}.lora_down.weight"] = torch.ones(2, inside)
    lora[f"lora_unet_{name}.lora_up.weight"] = torch.ones(outside, 2)
    lora[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
print("in the file:", *sorted(layers))
converted = _convert_kohya_flux_lora_to_diffusers(dict(lora))
print("converted:", *sorted({name.partition(".lora_")[0] for name in converted}))
pipeline = FluxPipeline(
    scheduler=None,
    vae=None,
    text_encoder=None,
    tokenizer=None,
    text_encoder_2=None,
    tokenizer_2=None,
    transformer=transformer,
)
pipeline.load_lora_weights(lora)
loaded = sorted(name for name, module in transformer.named_modules() if hasattr(module, "lora_A"))
print("loaded:", *loaded)
if loaded != ["transformer_blocks.0.attn.to_out.0"]:
    raise SystemExit("CHANGED: other layers are loaded")
PYTHON
"$python" "$work/try.py" 2> "$work/log" | grep -E "^(diffusers|in the file|converted|loaded)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
