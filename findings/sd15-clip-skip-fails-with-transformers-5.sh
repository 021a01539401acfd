#!/usr/bin/env bash
# StableDiffusionPipeline's clip_skip asks transformers 5 for a module that is no longer there.
#
# Versions: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# What surprises: with clip_skip the pipeline applies the final layer norm of text_encoder.text_model
# itself. CLIPTextModel of transformers 5 has its layers directly, without text_model, and sampling ends
# with an AttributeError; without clip_skip the same pipeline samples. Both versions may be installed
# together by their own requirements.
#
# Seen:
#   diffusers 0.42.1 transformers 5.23.0
#   clip_skip=None: an image of 8 x 8
#   clip_skip=1: AttributeError: 'CLIPTextModel' object has no attribute 'text_model'
#
# Why it matters: many SD1.5 models are made for "Clip skip: 2", and a script that has sampled them for
# years stops after an update of transformers.
#
# What FastPO does: with prepare.clip_skip it encodes prompts itself, for training and for sampling
# (fastpo/models/clip.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0

cat > "$work/try.py" <<'PYTHON'
import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

print("diffusers", diffusers.__version__, "transformers", transformers.__version__)
words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
tokenizer = CLIPTokenizer(
    vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=8
)
config = CLIPTextConfig(
    vocab_size=len(words),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=8,
    bos_token_id=0,
    eos_token_id=1,
)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64),
    layers_per_block=1,
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
)
pipeline = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
    text_encoder=CLIPTextModel(config),
    tokenizer=tokenizer,
    unet=unet,
    scheduler=DDIMScheduler(),
    safety_checker=None,
    feature_extractor=None,
)
pipeline.set_progress_bar_config(disable=True)
told = {}
for skip in (None, 1):
    try:
        image = pipeline("a b", num_inference_steps=1, clip_skip=skip, output_type="np").images
        told[skip] = f"an image of {image.shape[1]} x {image.shape[2]}"
    except AttributeError as error:
        told[skip] = f"AttributeError: {error}"
    print(f"clip_skip={skip}: {told[skip]}")
if not (told[None].startswith("an image") and "text_model" in told[1]):
    raise SystemExit("CHANGED: clip_skip gives something else")
PYTHON
"$python" "$work/try.py" 2> "$work/log" | grep -E "^(diffusers|clip_skip|CHANGED)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
