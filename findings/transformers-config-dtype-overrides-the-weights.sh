#!/usr/bin/env bash
# transformers 5 loads float32 weights as float16 if config.json says so, and the other way round.
#
# Versions: transformers 5.23.0, torch 2.13.0, safetensors 0.8.0, Python 3.11.
#
# What surprises: without a dtype argument, from_pretrained takes the dtype that config.json names
# over the dtype of the weights file. Text encoders
# whose config was written when they were half precision, beside a float32 file, so lose half of
# their digits on loading, without a word. dtype=torch.float32 asks for what the file holds.
#
# Seen (a small CLIP text encoder):
#   transformers 5.23.0 torch 2.13.0+cpu
#   file torch.float32, config torch.float16: loaded as torch.float16, with dtype=torch.float32 as torch.float32
#   file torch.float16, config torch.float32: loaded as torch.float32, with dtype=torch.float16 as torch.float16
#
# Why it matters: prompt embeddings are computed once and cached for preference training; published
# pipelines carry configs and files of different precision.
#
# What FastPO does: it passes a dtype to every from_pretrained of an encoder, and keeps the dtype
# key of config.json out of the fingerprint of a model folder.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.23.0 safetensors==0.8.0

FOLDER=$work/model "$python" - 2>"$work/log" <<'PYTHON' || { cat "$work/log"; exit 1; }
import json
import os

import torch
import transformers
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

print("transformers", transformers.__version__, "torch", torch.__version__)
folder = os.environ["FOLDER"]
config = CLIPTextConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=100,
)
half, full = torch.float16, torch.float32
for stored, named in ((full, half), (half, full)):
    CLIPTextModel(config).to(stored).save_pretrained(folder)
    with open(f"{folder}/config.json") as file:
        text = json.load(file)
    text["dtype"] = str(named).removeprefix("torch.")
    with open(f"{folder}/config.json", "w") as file:
        json.dump(text, file)
    (inside,) = {t.dtype for t in load_file(f"{folder}/model.safetensors").values()}
    loaded = CLIPTextModel.from_pretrained(folder).dtype
    asked = CLIPTextModel.from_pretrained(folder, dtype=stored).dtype
    print(f"file {inside}, config {named}: loaded as {loaded}, with dtype={stored} as {asked}")
    if inside != stored or loaded != named:
        raise SystemExit("CHANGED: the dtype of config.json no longer decides")
    if asked != stored:
        raise SystemExit("CHANGED: a dtype argument no longer decides")
PYTHON
