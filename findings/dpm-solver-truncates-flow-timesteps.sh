#!/usr/bin/env bash
# A DPM-Solver that samples a flow-matching model tells it whole timesteps, and goes by other sigmas.
#
# Versions: diffusers 0.42.1, torch 2.13.0, Python 3.11.
#
# What surprises: with use_flow_sigmas, DPMSolverMultistepScheduler (the scheduler of Sana's pipelines) cuts
# 1000 * sigma to an integer for its timesteps. The latents stand at the exact sigma; what the transformer
# is told is up to one step of the thousand smaller. FlowMatchEulerDiscreteScheduler, with the same shift,
# keeps float timesteps that are 1000 * sigma.
#
# Seen:
#   diffusers 0.42.1
#   FlowMatchEulerDiscreteScheduler: torch.float32, of 1000 sigma off by at most 0.000
#   DPMSolverMultistepScheduler: torch.int64, of 1000 sigma off by at most 0.941
#
# Why it matters: whoever compares a trainer's prediction with one step of such a pipeline, or computes sigma
# from the timestep that the model was told, finds a difference that is no error of the model's call.
#
# What FastPO does: it trains with the real timestep, 1000 * sigma, and where it is compared with a step of the
# pipeline the step's timestep is set to that (tests/models/family_cases.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install diffusers==0.42.1 transformers==5.23.0 scipy

cat > "$work/try.py" <<'PYTHON'
import diffusers
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

print("diffusers", diffusers.__version__)
euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
solver = DPMSolverMultistepScheduler(
    algorithm_type="dpmsolver++",
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=3.0,
)
found = []
for scheduler in (euler, solver):
    scheduler.set_timesteps(20)
    told, sigma = scheduler.timesteps, scheduler.sigmas[:-1]
    off = float((1000 * sigma.double() - told.double()).abs().max())
    name = type(scheduler).__name__
    print(f"{name}: {told.dtype}, of 1000 sigma off by at most {off:.3f}")
    found.append((str(told.dtype), off > 0.5))
if found != [("torch.float32", False), ("torch.int64", True)]:
    raise SystemExit(f"CHANGED: {found}")
PYTHON
"$python" "$work/try.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
