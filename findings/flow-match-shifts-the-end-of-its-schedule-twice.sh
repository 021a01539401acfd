#!/usr/bin/env bash
# FlowMatchEulerDiscreteScheduler shifts the end of its schedule twice, so sampling stops short of it.
#
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
#
# What surprises: a new scheduler has 1,000 sigmas, shifted by shift * s / (1 + (shift - 1) * s), and keeps
# the smallest as sigma_min. set_timesteps(n) spreads n values from sigma_max to this sigma_min and then
# shifts all of them, sigma_min included. With shift=3 the last sigma before 0 is 0.00893 instead of
# 0.00299, whatever n is. Sigmas that are given, as FLUX's and Qwen-Image's pipelines do, are shifted once.
#
# Seen (shift 3):
#   diffusers 0.42.1 torch 2.13.0+cpu
#   a new scheduler: from 1.00000 to 0.00299
#   set_timesteps(28): from 1.00000 to 0.00893, then 0
#   set_timesteps(1000): from 1.00000 to 0.00893, then 0
#   set_timesteps(sigmas=1 to 1/1000 in 28): from 1.00000 to 0.00299, then 0
#
# Why it matters: who reads a model's noise levels after a pipeline has sampled, or takes set_timesteps(1000)
# for the training schedule, has other levels than the model was trained on, and none below 0.009.
#
# What FastPO does: the schedule is formed from the scheduler's configuration, shifted once
# (fastpo/models/schedule.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1

cat > "$work/try.py" <<'PYTHON'
import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

print("diffusers", diffusers.__version__, "torch", torch.__version__)


def shifted(sigma):
    return 3 * sigma / (1 + 2 * sigma)


found = {"new": float(FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[-1])}
print(f"a new scheduler: from 1.00000 to {found['new']:.5f}")
for steps in (28, 1000):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    first, last, end = (float(scheduler.sigmas[place]) for place in (0, -2, -1))
    found[steps] = last
    print(f"set_timesteps({steps}): from {first:.5f} to {last:.5f}, then {end:.0f}")
scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 1000, 28))
first, last, end = (float(scheduler.sigmas[place]) for place in (0, -2, -1))
print(f"set_timesteps(sigmas=1 to 1/1000 in 28): from {first:.5f} to {last:.5f}, then {end:.0f}")
once, twice = shifted(1 / 1000), shifted(shifted(1 / 1000))
same = np.allclose([found["new"], last, found[28], found[1000]], [once, once, twice, twice], 1e-4)
if not same:
    raise SystemExit("CHANGED: the end of the schedule is shifted otherwise")
PYTHON
"$python" "$work/try.py" 2> "$work/log" | grep -E "^(diffusers|a new|set_|CHANGED)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
