#!/usr/bin/env bash
# Triton's interpreter keeps a NaN that the compiled kernel drops.
#
# Versions: triton 3.7.1, torch 2.13.0, numpy 2.4.6, Python 3.11.
#
# What surprises: under TRITON_INTERPRET=1, tl.maximum and tl.minimum are numpy's, which return NaN
# if either operand is one. Compiled for a GPU they become max.f32 and min.f32, which return the
# other operand, as the PTX manual says of max and min (read from the code; not run on a GPU here).
# With propagate_nan=tl.PropagateNan.ALL the compiled instruction is max.NaN.f32, which agrees with
# the interpreter.
#
# Seen (the compiled part needs no GPU: the kernels are compiled ahead of time for sm_90):
#   triton 3.7.1 torch 2.13.0+cpu
#   interpreted elementwise_max(nan, 1) = nan
#   interpreted elementwise_min(nan, 1) = nan
#   interpreted max_that_propagates(nan, 1) = nan
#   compiled    elementwise_max: max.f32
#   compiled    elementwise_min: min.f32
#   compiled    max_that_propagates: max.NaN.f32
#
# Why it matters: a preference loss clamps weights, probabilities and margins. A test in the
# interpreter then shows that NaN in a prediction reaches the loss and stops the run, while on the
# GPU the same clamp turns it into an ordinary bound, and training goes on with wrong weights.
#
# What FastPO does: minima and maxima of its kernels propagate NaN
# (kernels/fastpo_kernels/_shared/triton_math.py).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install triton==3.7.1 numpy==2.4.6

cat >"$work/finding.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def elementwise_max(x, y, out):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.maximum(tl.load(x + i), tl.load(y + i)))


def elementwise_min(x, y, out):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.minimum(tl.load(x + i), tl.load(y + i)))


def max_that_propagates(x, y, out):
    i = tl.arange(0, 16)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))


def check(name, got, expected):
    if got != expected:
        raise SystemExit(f"CHANGED: {name} gave {got}; it was {expected}")


KERNELS = {
    elementwise_max: ("max.f32", float("nan")),
    elementwise_min: ("min.f32", float("nan")),
    max_that_propagates: ("max.NaN.f32", float("nan")),
}
if sys.argv[1] == "interpreted":
    print("triton", triton.__version__, "torch", torch.__version__)
    x, y, out = torch.zeros(16), torch.ones(16), torch.zeros(16)
    x[3] = float("nan")
    for kernel in KERNELS:
        triton.jit(kernel)[(1,)](x, y, out)
        print(f"interpreted {kernel.__name__}(nan, 1) = {out[3].item()}")
        check(kernel.__name__, out[3].isnan().item(), True)
else:
    signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32"}
    for kernel, (instruction, _) in KERNELS.items():
        source = ASTSource(triton.jit(kernel), signature=signature, constexprs={})
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        used = sorted({w for w in ptx.split() if w.startswith(("max.", "min."))})
        print(f"compiled    {kernel.__name__}: {' '.join(used)}")
        check(kernel.__name__, used, [instruction])
PYTHON
TRITON_INTERPRET=1 "$python" "$work/finding.py" interpreted
TRITON_CACHE_DIR=$work/cache "$python" "$work/finding.py" compiled
