#!/usr/bin/env bash
# DeepSpeed's ZeRO-3 turns every weight into text when it starts, for a message that is never shown.
#
# Versions: deepspeed 0.19.8, torch 2.13.0, Python 3.11.
#
# What surprises: the optimizer of stage 3 begins with a message that says what it was made with, all
# local variables, and that is printed only if somebody changes the source. The text is formed all
# the same, and with it that of each parameter: values are read, compared and rounded as for a
# person, one tensor after the other. Stages 1 and 2 form none.
#
# Seen (200 parameters, one process, gloo):
#   deepspeed 0.19.8 torch 2.13.0+cpu
#   stage 1: 200 parameters, 0 turned into text
#   stage 2: 200 parameters, 0 turned into text
#   stage 3: 200 parameters, 200 turned into text
#
# Why it matters: about five milliseconds a parameter on a CPU; on a GPU each text waits for the
# device several times. A UNet of SDXL has 1,680 parameters. In a profile of the start of a model
# with 212 parameters, half of the time went there.
#
# What FastPO does: while the engine starts, torch's printing is set to texts of a few numbers, which
# take a sixth of the time (fastpo/train/zero.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export DS_ACCELERATOR=cpu PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install setuptools wheel
install --no-build-isolation deepspeed==0.19.8

cat > "$work/count.py" <<'PYTHON'
import os
import socket

with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = str(listener.getsockname()[1])
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

import deepspeed
import torch

print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
texts, shown = [], torch.nn.Parameter.__repr__


def counted(parameter):
    texts.append(shown(parameter))
    return texts[-1]


torch.nn.Parameter.__repr__ = counted
deepspeed.init_distributed("gloo")
found = {}
for stage in (1, 2, 3):
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(100)))
    texts.clear()
    deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    found[stage] = len(texts)
    print(f"stage {stage}: 200 parameters, {len(texts)} turned into text")
if found != {1: 0, 2: 0, 3: 200}:
    raise SystemExit("CHANGED: other parameters are turned into text")
PYTHON
"$python" "$work/count.py" 2> "$work/log" | grep -E "^(deepspeed|stage|CHANGED)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
