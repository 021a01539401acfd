#!/usr/bin/env bash
# ZImagePipeline.encode_prompt puts the chat's template into the list of prompts that it is given.
#
# Versions: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# What surprises: a list of prompts is not the caller's any more after the call: each prompt has become
# the chat around it. Who passes the same list again, encodes the chat around a chat; no error says so.
# Its siblings (image to image, inpainting, ControlNet, Omni) do the same; a single text is not changed.
#
# Seen:
#   diffusers 0.42.1
#   before: ['cat']
#   after: ['user: cat']
#   the same list again: ['user: user: cat']
#
# Why it matters: scripts that encode a list once to look at it and once to sample, or that sample the same
# list with several seeds, get other images from the second call on.
#
# What FastPO does: it gives the pipeline a list of its own (fastpo/models/family.py, prompt_arguments, and
# fastpo/models/z_image.py).

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
from types import SimpleNamespace

import diffusers
import torch
from diffusers import ZImagePipeline

print("diffusers", diffusers.__version__)


class Tokenizer:
    """A chat's template of a few letters, and a token for each letter."""

    def apply_chat_template(self, messages, **options):
        return f"user: {messages[0]['content']}"

    def __call__(self, texts, max_length, **options):
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor([ord(letter) for letter in text])
        return SimpleNamespace(input_ids=ids, attention_mask=ids != 0)


def text_encoder(input_ids, attention_mask, output_hidden_states):
    states = input_ids.float()[..., None]
    return SimpleNamespace(hidden_states=[states, states])


parts = SimpleNamespace(tokenizer=Tokenizer(), text_encoder=text_encoder)
parts._encode_prompt = ZImagePipeline._encode_prompt.__get__(parts)
prompts = ["cat"]
told = []
for title in ("before", "after", "the same list again"):
    told.append(list(prompts))
    print(f"{title}: {prompts}")
    ZImagePipeline.encode_prompt(parts, prompts, device="cpu", do_classifier_free_guidance=False)
if told != [["cat"], ["user: cat"], ["user: user: cat"]]:
    raise SystemExit("CHANGED: the caller's list stays as it was")
PYTHON
"$python" "$work/try.py" 2> "$work/log" | grep -E "^(diffusers|before|after|the same)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
