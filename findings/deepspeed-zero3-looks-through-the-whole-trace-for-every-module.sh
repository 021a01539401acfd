#!/usr/bin/env bash
# DeepSpeed's ZeRO-3 has one training step whose time grows with the square of the number of layers.
#
# Versions: deepspeed 0.19.8, torch 2.13.0, Python 3.11.
#
# What surprises: in the second step the coordinator decides for every module which of its weights may
# be released, by going through all modules that come later in the recorded trace, up to
# stage3_max_reuse_distance elements (default 1e9, more than most models have). Each of the n modules
# looks at up to n others. The answers are kept, so later steps are quick. Below a reuse distance that
# ends after a few layers the work is linear.
#
# Seen (lists of parameters asked for in each of three steps; one process, gloo):
#   deepspeed 0.19.8 torch 2.13.0+cpu
#   50 layers, reuse distance 1,000,000,000: [306, 5559, 206]
#   50 layers, reuse distance 10,000: [306, 809, 206]
#   100 layers, reuse distance 1,000,000,000: [606, 21109, 406]
#   100 layers, reuse distance 10,000: [606, 1609, 406]
#   200 layers, reuse distance 1,000,000,000: [1206, 82209, 806]
#   200 layers, reuse distance 10,000: [1206, 3209, 806]
#
# Why it matters: a run of few steps is mostly this one, and a model of thousands of modules pays seconds
# of Python on every process while the GPUs wait. A benchmark that warms up for one step measures it.
#
# What FastPO does: its tests of stage 3 set a small distance, which takes a third off a run of four steps.

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

cat > "$work/try.py" <<'PYTHON'
import os
import socket

with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = str(listener.getsockname()[1])
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

import deepspeed
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
asked, parameters_of = [0], coordinator.iter_params


def counted(module, *args, **kwargs):
    asked[0] += 1
    return parameters_of(module, *args, **kwargs)


coordinator.iter_params = counted
deepspeed.init_distributed("gloo")


def steps(layers, distance):
    """Lists of parameters asked for in each of three training steps."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(layers)))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_max_reuse_distance": distance},
            "zero_allow_untested_optimizer": True,
        },
    )
    found = []
    for _ in range(3):
        asked[0] = 0
        engine.backward(engine(torch.ones(1, 64)).sum())
        engine.step()
        found.append(asked[0])
    return found


table = {}
for layers in (50, 100, 200):
    for distance in (1_000_000_000, 10_000):
        table[layers, distance] = steps(layers, distance)
        print(f"{layers} layers, reuse distance {distance:,}: {table[layers, distance]}")
far = [table[layers, 1_000_000_000] for layers in (50, 100, 200)]
near = [table[layers, 10_000] for layers in (50, 100, 200)]
quadratic = all(b[1] > 3 * a[1] for a, b in zip(far, far[1:]))
linear = all(b[1] < 3 * a[1] for a, b in zip(near, near[1:]))
once = all(counts[2] < counts[1] / 5 for counts in far)
if not (quadratic and linear and once):
    raise SystemExit("CHANGED: the second step no longer looks through the whole trace")
PYTHON
"$python" "$work/try.py" 2> "$work/log" | grep -E "^(deepspeed|[0-9]+ layers|CHANGED)" || { cat "$work/log"; exit 1; }
if grep -q CHANGED "$work/log"; then cat "$work/log"; exit 1; fi
