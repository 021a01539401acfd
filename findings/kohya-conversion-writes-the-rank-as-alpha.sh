#!/usr/bin/env bash
# diffusers' converter to the kohya format writes each layer's rank where its alpha belongs.
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, Python 3.11.
#
# What surprises: convert_state_dict_to_kohya adds an ".alpha" tensor to every layer, which is what tells
# the programs that read this format how strong the adapter is (they scale by alpha / rank). A state dict
# of matrices holds no alpha, so the number of rows of the first matrix is written, without a word and
# without an argument to say otherwise.
#
# Seen:
#   diffusers 0.42.1 peft 0.21.2
#   lora_unet_base_model_model_to_q.lora_down.weight (8, 16)
#   lora_unet_base_model_model_to_q.alpha 8.0
#   lora_unet_base_model_model_to_q.lora_up.weight (16, 8)
#   trained with alpha 32, rank 8; the file says alpha 8: 0.250 of the effect
#
# Why it matters: a LoRA with alpha other than its rank works in diffusers and at alpha / rank of that in
# ComfyUI, Automatic1111 and the like.
#
# What FastPO does: `fastpo export` writes these files itself, with each layer's own alpha
# (fastpo/models/lora_formats.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0

cat > "$work/try.py" <<'PYTHON'
import diffusers
import peft
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

print("diffusers", diffusers.__version__, "peft", peft.__version__)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.to_q(x)


def adapted(**options):
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["to_q"], init_lora_weights=False, **options)
    return get_peft_model(Model(), config)


model = adapted(lora_alpha=32)
state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(model).items()}
kohya = convert_state_dict_to_kohya(state)
for key, value in kohya.items():
    print(key, float(value) if value.ndim == 0 else tuple(value.shape))
(alpha,) = (float(value) for key, value in kohya.items() if key.endswith(".alpha"))
(down,) = (value for key, value in kohya.items() if key.endswith("lora_down.weight"))
(up,) = (value for key, value in kohya.items() if key.endswith("lora_up.weight"))
x = torch.ones(1, 16)
trained = model(x) - model.unload()(x)
read = x @ down.T @ up.T * alpha / len(down)  # as programs of this format scale
ratio = float(read.norm() / trained.norm())
print(f"trained with alpha 32, rank 8; the file says alpha {alpha:g}: {ratio:.3f} of the effect")
if (alpha, round(ratio, 3)) != (8.0, 0.25):
    raise SystemExit("CHANGED: alpha is written otherwise")
PYTHON
"$python" "$work/try.py" 2> "$work/log" | grep -E "^(diffusers|lora_unet|trained|CHANGED)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
