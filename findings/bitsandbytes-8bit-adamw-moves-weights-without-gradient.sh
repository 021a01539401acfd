#!/usr/bin/env bash
# 8-bit AdamW on a CPU moves weights whose gradient has always been exactly zero.
#
# Versions: bitsandbytes 0.50.2, torch 2.13.0, Python 3.11.
#
# What surprises: both moments are stored in 8 bits with one scale for every 256 of them. The code
# table holds an exact 0, yet on a CPU an exact zero is stored as the neighbor of it, about 2e-5 of
# the block's largest value. A weight without gradient beside one with gradient so gets moments
# from nowhere, whose ratio m / sqrt(v) is not small, and moves from the second step on, at a
# hundredth of the full pace, always to the same side. Tensors below 4096 elements have float32
# states and stay exact, as torch.optim.AdamW does.
#
# Seen (weight decay 0, rate 1e-3, one element of 256 has a gradient of 1, the others 0):
#   bitsandbytes 0.50.2 torch 2.13.0+cpu
#   bitsandbytes AdamW8bit, 4096 elements: with gradient 5.00e-03, without 1.67e-05
#   first moment of a zero gradient: 2.1e-05 of the block's largest; the table has an exact 0: True
#   second moment of a zero gradient: 1.6e-05 of the block's largest; the table has an exact 0: True
#   bitsandbytes AdamW8bit, 4095 elements: with gradient 5.00e-03, without 0.00e+00
#   torch AdamW, 4096 elements: with gradient 5.00e-03, without 0.00e+00
#
# Why it matters: gradients are exactly zero for embeddings and channels that a batch does not
# touch. They drift, and "the policy equals the reference where nothing was learned" fails.
#
# What FastPO does: 8-bit AdamW is an option (train.optim.name: adamw_8bit), not the default.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install bitsandbytes==0.50.2

"$python" - <<'PYTHON'
import bitsandbytes
import torch

print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)


def moved(title, optimizer, n):
    """How far the touched and the untouched weights have moved after five steps."""
    weight = torch.nn.Parameter(torch.zeros(n))
    updates = optimizer([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        weight.grad = torch.zeros(n)
        weight.grad[::256] = 1.0
        updates.step()
    still = torch.ones(n, dtype=torch.bool)
    still[::256] = False
    touched, untouched = weight[~still].abs().max().item(), weight[still].abs().max().item()
    print(f"{title}, {n} elements: with gradient {touched:.2e}, without {untouched:.2e}")
    return updates.state[weight], untouched


state, untouched = moved("bitsandbytes AdamW8bit", bitsandbytes.optim.AdamW8bit, 4096)
for name, code, scale, table in (
    ("first moment", "state1", "absmax1", "qmap1"),
    ("second moment", "state2", "absmax2", "qmap2"),
):
    stored = state[table][state[code][1].long()].item()
    print(
        f"{name} of a zero gradient: {stored:.1e} of the block's largest;",
        "the table has an exact 0:",
        bool((state[table] == 0).any()),
    )
    if stored == 0:
        raise SystemExit(f"CHANGED: a {name} of zero is stored as zero")
if untouched == 0:
    raise SystemExit("CHANGED: weights without gradient stay where they are")
if moved("bitsandbytes AdamW8bit", bitsandbytes.optim.AdamW8bit, 4095)[1] != 0:
    raise SystemExit("CHANGED: small tensors no longer have exact states")
if moved("torch AdamW", torch.optim.AdamW, 4096)[1] != 0:
    raise SystemExit("CHANGED: torch's AdamW moves weights without gradient")
PYTHON
