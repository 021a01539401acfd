#!/usr/bin/env bash
# With transformers 5 QwenImageEditPipeline gives the source image's tokens the positions of plain text.
#
# Versions: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# What surprises: Qwen2.5-VL counts an image's tokens by row and column. transformers 5 does so only where it
# is told which tokens are an image's (mm_token_type_ids, which its processor returns); the pipelines of
# diffusers pass the other outputs of the processor on, and not this one. The model then counts the
# tokens one by one, as if they were words, and the prompt's embeddings are others.
#
# Seen:
#   diffusers 0.42.1 transformers 5.23.0
#   processor's outputs passed on: attention_mask image_grid_thw input_ids pixel_values
#   positions as the pipeline asks: none, so text's: 0 1 2 3 4 5 6
#   rows with the tokens' types: 0 1 1 2 2 3 4
#   embeddings are equal: False
#
# Why it matters: the language model learned pictures by rows and columns, and the transformer its states of
# them; a trainer that passes all of the processor's outputs trains on other embeddings than these pipelines sample
# with.
#
# What FastPO does: it encodes by the pipeline's own function, so training sees what this pipeline samples
# with, and says so (docs/flow-models.md).

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
import transformers
from diffusers import QwenImageEditPipeline
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

print("diffusers", diffusers.__version__, "transformers", transformers.__version__)
IMAGE = 5
config = Qwen2_5_VLConfig(
    text_config={
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    vision_config={
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    },
    image_token_id=IMAGE,
    vision_start_token_id=3,
    video_token_id=6,
)
torch.manual_seed(0)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
ids = torch.tensor([[3, IMAGE, IMAGE, IMAGE, IMAGE, 1, 2]])
outputs = BatchFeature(
    {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
)
passed, positions = set(), []
forward, count = model.forward, model.model.compute_3d_position_ids


def watched(**inputs):
    passed.update(name for name in inputs if name in outputs)
    return forward(**inputs)


def counted(*args, **kwargs):
    positions.append(count(*args, **kwargs))
    return positions[-1]


model.forward, model.model.compute_3d_position_ids = watched, counted
parts = SimpleNamespace(
    _execution_device="cpu",
    text_encoder=model,
    processor=lambda **options: outputs,
    prompt_template_encode="{}",
    prompt_template_encode_start_idx=0,
    _extract_masked_hidden=lambda states, mask: list(states),
)
with torch.no_grad():
    embeds, _ = QwenImageEditPipeline._get_qwen_prompt_embeds(parts, ["a"], image=object())
    print("processor's outputs passed on:", *sorted(passed))
    asked = "none, so text's: 0 1 2 3 4 5 6" if positions[0] is None else positions[0][1, 0].tolist()
    print("positions as the pipeline asks:", asked)
    told = forward(**outputs, output_hidden_states=True).hidden_states[-1]
    print("rows with the tokens' types:", *positions[1][1, 0].tolist())
equal = torch.equal(embeds, told)
print("embeddings are equal:", equal)
if equal or "mm_token_type_ids" in passed or positions[0] is not None:
    raise SystemExit("CHANGED: the pipeline tells the tokens' types")
PYTHON
"$python" "$work/try.py" 2> "$work/log" | grep -E "^(diffusers|processor|positions|rows|embeddings)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
