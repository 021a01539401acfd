#!/usr/bin/env bash
# A new DPM-Solver++ or UniPC scheduler gives timestep 10 the noise of timestep 989, and so on.
#
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
#
# What surprises: until set_timesteps is called, these schedulers hold timesteps from 999 down to 0
# beside sigmas that rise from 0 to 999. add_noise looks a timestep up in the one and reads the
# other at the same place, so time runs backwards. No error, no warning. After set_timesteps(1000)
# they agree with DDPMScheduler (but for timestep 0, which gets the noise of timestep 1).
#
# Seen (weight of the noise, Stable Diffusion's schedule):
#   diffusers 0.42.1 torch 2.13.0+cpu
#   timestep                                               10    100    300    600    900    990
#   DDPMScheduler                                      0.0978 0.3252 0.6399 0.9161 0.9929 0.9974
#   DDPMScheduler at 999 - t                           0.9974 0.9928 0.9575 0.7576 0.3233 0.0932
#   DPMSolverMultistepScheduler, new                   0.9974 0.9928 0.9575 0.7576 0.3233 0.0932
#   DPMSolverMultistepScheduler, set_timesteps(1000)   0.0978 0.3252 0.6399 0.9161 0.9929 0.9974
#   UniPCMultistepScheduler, new                       0.9974 0.9928 0.9575 0.7576 0.3233 0.0932
#   UniPCMultistepScheduler, set_timesteps(1000)       0.0978 0.3252 0.6399 0.9161 0.9929 0.9974
#   DEISMultistepScheduler, new                        0.9974 0.9928 0.9575 0.7576 0.3233 0.0932
#   DEISMultistepScheduler, set_timesteps(1000)        0.0978 0.3252 0.6399 0.9161 0.9929 0.9974
#
# Why it matters: many published pipelines come with one of these schedulers, and
# pipeline.scheduler.add_noise in a training loop is the obvious call. The model is told timestep
# 10 and sees nearly pure noise; the loss falls all the same, and the model is ruined.
#
# What FastPO does: it reads alphas_cumprod, which all of these schedulers hold in the same order,
# and never calls add_noise of a folder's scheduler.

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
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

print("diffusers", diffusers.__version__, "torch", torch.__version__)
timesteps = torch.tensor([10, 100, 300, 600, 900, 990])
shape = (len(timesteps), 1, 1, 1)
schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def weights(title, scheduler, at=timesteps):
    row = scheduler.add_noise(torch.zeros(shape), torch.ones(shape), at).flatten()
    print(f"{title:50s}", *(f"{w:.4f}" for w in row.tolist()))
    return row


print(f"{'timestep':50s}", *(f"{t:6d}" for t in timesteps.tolist()))
right = weights("DDPMScheduler", DDPMScheduler(**schedule))
reverse = weights("DDPMScheduler at 999 - t", DDPMScheduler(**schedule), 999 - timesteps)
for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler):
    scheduler = kind(**schedule)
    new = weights(f"{kind.__name__}, new", scheduler)
    scheduler.set_timesteps(1000)
    mended = weights(f"{kind.__name__}, set_timesteps(1000)", scheduler)
    if not torch.allclose(new, reverse, atol=1e-3):
        raise SystemExit(f"CHANGED: a new {kind.__name__} no longer adds the noise of 999 - t")
    if not torch.allclose(mended, right, atol=1e-3):
        raise SystemExit(f"CHANGED: {kind.__name__} is not right after set_timesteps(1000)")
PYTHON
