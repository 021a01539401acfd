#!/usr/bin/env bash
# EMAModel(decay=0.9999, use_ema_warmup=False) does not decay with 0.9999 before step 90,000.
#
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
#
# What surprises: use_ema_warmup=False (the default) chooses between two warm-ups. Without it the
# decay is min(decay, (1 + s) / (10 + s)), which reaches 0.9999 after 89,991 steps. And the first
# step's decay is 0, past min_decay too: the average's start is replaced by the live weights.
# min_decay=decay gives the constant decay from the second step on.
#
# Seen:
#   diffusers 0.42.1 torch 2.13.0+cpu
#   use_ema_warmup=False: step 1: 0.0000, step 2: 0.1818, step 100: 0.9174, step 2000: 0.9955, step 10000: 0.9991, step 89000: 0.9999, step 90000: 0.9999
#   min_decay=0.9999: step 1: 0.0000, step 2: 0.9999, step 100: 0.9999, step 2000: 0.9999, step 10000: 0.9999, step 89000: 0.9999, step 90000: 0.9999
#   average of 0 after one step with weight 1: 1.0
#
# Why it matters: preference training takes 500 to 10,000 steps, so a slow reference or annotator
# with decay 0.9999 is never slow (0.9955 at step 2000: an average over 220 steps, not 10,000),
# and comparisons of decays above 0.996 compare a model with itself.
#
# What FastPO does: it has the same ramp, says so at MovingAverages and in the numbers there, and
# starts it at step 1 without dropping the start.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 transformers==5.23.0

"$python" - <<'PYTHON'
import diffusers
import torch
from diffusers.training_utils import EMAModel

print("diffusers", diffusers.__version__, "torch", torch.__version__)


def decays(title, steps, **options):
    ema = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.9999, **options)
    rates = [ema.get_decay(step) for step in steps]
    print(f"{title}:", ", ".join(f"step {s}: {r:.4f}" for s, r in zip(steps, rates, strict=True)))
    return rates


steps = (1, 2, 100, 2000, 10_000, 89_000, 90_000)
off = decays("use_ema_warmup=False", steps, use_ema_warmup=False)
held = decays("min_decay=0.9999", steps, min_decay=0.9999)
weight = torch.nn.Parameter(torch.zeros(1))
ema = EMAModel([weight], decay=0.9999, min_decay=0.9999)
weight.data.fill_(1.0)
ema.step([weight])
print("average of 0 after one step with weight 1:", ema.shadow_params[0].item())
if not (off[3] < 0.996 and off[5] < 0.9999 and off[6] == 0.9999):
    raise SystemExit("CHANGED: use_ema_warmup=False no longer warms up")
if held[0] != 0.0 or ema.shadow_params[0].item() != 1.0:
    raise SystemExit("CHANGED: the first step keeps the average's start")
if any(rate != 0.9999 for rate in held[1:]):
    raise SystemExit("CHANGED: min_decay=decay no longer gives a constant decay from step 2 on")
PYTHON
